"""Two runs beside each other: before and after, or one machine and another."""

from dataclasses import asdict, dataclass
from typing import Any

from fedexec._report import numbers
from fedexec._report.reading import Run
from fedexec._report.rules import MARGIN, MEMORY_MARGIN
from fedexec._report.table import Row, rows, workloads
from fedexec._report.verdict import decide

__all__ = ["Change", "compare", "same_machine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became of one strategy and workload.

    Attributes
    ----------
    ratio : float
        Median of the second run by that of the first.
    margin : float
        A difference below this share says nothing.
    words : str
    """

    workload: str
    strategy: str
    first: float
    second: float
    ratio: float
    margin: float
    words: str

    def as_dict(self) -> dict[str, Any]:
        """Return this as JSON knows it."""
        return asdict(self)


def same_machine(first: Run, second: Run) -> bool:
    """Whether both runs come from one machine."""
    return first.machines == second.machines


def compare(first: Run, second: Run) -> tuple[list[Change], list[str]]:
    """Compare every strategy that both runs measured.

    Returns
    -------
    tuple of (list of Change, list of str)
        And what is to be said about them: the machines, the verdicts, what only one of them has.
    """
    changes: list[Change] = []
    notes = [] if same_machine(first, second) else [_machines(first, second)]
    notes += [f"{one} is only in {first.label}." for one in workloads(first) if one not in workloads(second)]
    for workload in workloads(second):
        before = {row.strategy: row for row in rows(first, workload)}
        after = {row.strategy: row for row in rows(second, workload)}
        if not before:
            notes.append(f"{workload} is only in {second.label}.")
            continue
        both = _both(before, after)
        if [name for name in both if before[name].conditions != after[name].conditions]:
            notes.append(
                f"{workload}: rounds are not compared: {before[both[0]].conditions} in {first.label}, "
                f"{after[both[0]].conditions} in {second.label}."
            )
            both = []
        changes += [_change(workload, before[name], after[name]) for name in both]
        lost, new = sorted(before.keys() - after.keys()), sorted(after.keys() - before.keys())
        notes += [f"{workload}: {name} is only in {first.label}." for name in lost]
        notes += [f"{workload}: {name} is only in {second.label}." for name in new]
        old = _verdict(first, workload, before)
        now = _verdict(second, workload, after)
        told = f"the same, {now}" if old == now else f"{now}, was {old}"
        notes.append(f"{workload}: the verdict is {told}.")
    return changes, notes


def _verdict(run: Run, workload: str, table: dict[str, Row]) -> str:
    """Return the strategy to use, or why there is none."""
    verdict = decide(list(table.values()), busy=run.busy(workload))
    return verdict.use or f"none ({verdict.why.removesuffix('.')})"


def _machines(first: Run, second: Run) -> str:
    return (
        f"Different machines: {first.label} is of {', '.join(first.machines)}, {second.label} of "
        f"{', '.join(second.machines)}. What differs may be the machine's doing."
    )


def _both(before: dict[str, Row], after: dict[str, Row]) -> list[str]:
    return [
        name for name in after if name in before and after[name].round_median and before[name].round_median
    ]


def _change(workload: str, before: Row, after: Row) -> Change:
    first, second = before.round_median or 0.0, after.round_median or 0.0
    margin = max(MARGIN, before.noise + after.noise)
    words = f"no change inside the noise of {numbers.percent(margin)}"
    if second > first * (1 + margin):
        words = f"slower by {numbers.percent(second / first - 1)}"
    elif first > second * (1 + margin):
        words = f"faster by {numbers.percent(first / second - 1)}"
    words += _memory(before, after)
    return Change(
        workload=workload,
        strategy=after.strategy,
        first=first,
        second=second,
        ratio=second / first,
        margin=margin,
        words=words,
    )


def _memory(before: Row, after: Row) -> str:
    told = ""
    for key, name in (("device_peak", "device"), ("host_peak", "host")):
        old, new = getattr(before, key), getattr(after, key)
        if old and new is not None and abs(new / old - 1) > MEMORY_MARGIN:
            told += f"; {name} peak {numbers.size(old)} → {numbers.size(new)}"
    return told
