"""Why a strategy is recommended or not: one line for its row."""

from collections.abc import Sequence
from dataclasses import replace

from fedexec._report import numbers, rules
from fedexec._report.table import Row
from fedexec._report.verdict import DEFAULT, Verdict

__all__ = ["with_reasons"]

MANY_TIMES = 1.0  # from twice the time on, times say more than percent


def with_reasons(table: Sequence[Row], verdict: Verdict) -> list[Row]:
    """Give each row its reason, and put them in the order of the answer.

    Parameters
    ----------
    table : sequence of Row
    verdict : Verdict
        What was decided about them.

    Returns
    -------
    list of Row
        The recommended one, then those that might be, then the others; the fastest first within each, what
        failed last.
    """
    chosen = next((row for row in table if row.strategy == verdict.use), None)
    found = [
        replace(row, eligible=rules.reason_against(row) is None, reason=_reason(row, chosen, verdict))
        for row in table
    ]
    return sorted(
        found,
        key=lambda row: (
            row.strategy != verdict.use,
            not row.eligible,
            row.failed is not None,
            rules.seconds(row),
        ),
    )


def _reason(row: Row, chosen: Row | None, verdict: Verdict) -> str:
    against = rules.reason_against(row)
    if against or chosen is None:
        return against or ""
    if row is chosen:
        return (
            "recommended: the default, and none is better" if _is_default_of_many(verdict) else "recommended"
        )
    if row.strategy in verdict.as_good:
        return f"as good as {chosen.strategy}"
    parts = [_time(row, chosen)]
    if chosen.gives_back and not row.gives_back:
        kept = row.device_residual
        parts.append(f"keeps {numbers.size(kept)} on the device" if kept else "keeps memory between clients")
    elif row.gives_back and not chosen.gives_back:
        parts.append("gives all memory back")
    both = rules.peaks(row, chosen)
    if both and rules.is_lighter(chosen, row) and len(parts) == 1:
        parts.append(f"takes {numbers.size(both[0])} of memory instead of {numbers.size(both[1])}")
    if len(parts) == 1 and row.peer and not rules.is_faster(chosen, row):
        parts.append("not one of fedexec's")
    return ", ".join(parts)


def _is_default_of_many(verdict: Verdict) -> bool:
    return verdict.use == DEFAULT and bool(verdict.as_good)


def _time(row: Row, chosen: Row) -> str:
    if rules.is_faster(row, chosen):
        return f"{chosen.strategy} takes {numbers.percent(rules.difference(row, chosen))} longer"
    if not rules.is_faster(chosen, row):
        return f"as fast as {chosen.strategy}"
    more = rules.difference(row, chosen)
    if more >= MANY_TIMES:
        return f"takes {more + 1:.{0 if more >= 9 else 1}f} times as long as {chosen.strategy}"
    return f"takes {numbers.percent(more)} longer than {chosen.strategy}"
