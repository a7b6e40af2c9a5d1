"""Which strategy to use, in words, and when to use another one.

How it decides:

1. Out are strategies that isolate nothing, failed, computed something else, lose other clients' work when one
   dies, ran out of memory, or were measured in fewer than three rounds. Each is named with its reason.
2. Of those that give all memory back with each client, the fastest is the *safe* one. What differs by less
   than the noise, and never less than 5 %, is as fast; then the smaller peak of memory decides, if it is
   smaller by more than 10 %. Of several that are as good, the default backend is recommended, else the
   fastest of fedexec's own; the others are named as being as good.
3. The fastest of all others, by the same rule, is the *keeping* one: its workers keep what clients took.
   Only if it is faster than the safe one by more than that margin, it is recommended.
4. On a machine that had much else to do there is no verdict: that hits strategies unequally.
5. Where another one is better, all that are as good are named; but no peer that is as fast as the best of
   fedexec's own backends, which a flag chooses.
6. The break-even is the compute of one client from which on the safe strategy costs less than 5 % over the
   keeping one: its extra seconds a client, by the difference of the medians (of the rounds, or where they
   are as fast, of tasks that do nothing), divided by 5 %. Where the keeping one is slower there is none, nor
   where it would lie above what clients computed as fast. Beyond 20 times what clients computed nothing is
   known: in its place stands the cause, imports that each client repeats, or what its process costs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedexec._report import numbers, rules
from fedexec._report.break_even import break_even, cause_beyond
from fedexec._report.table import Row

__all__ = ["DEFAULT", "Switch", "Verdict", "decide"]

DEFAULT = "standby"  # on Linux, where benchmarks are meant to run


@dataclass(frozen=True, slots=True)
class Switch:
    """When to use another strategy than the recommended one.

    Attributes
    ----------
    to : tuple of str
        Strategies that are as good as each other then.
    conditions : tuple of str
        Any of them is enough.
    """

    to: tuple[str, ...]
    conditions: tuple[str, ...]

    def __str__(self) -> str:
        return f"{' or '.join(self.conditions)}: to {_or(self.to)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer for one workload.

    Attributes
    ----------
    use : str or None
        The strategy that is recommended; None where nothing can be.
    as_good : tuple of str
        Others that are as fast and take as little memory.
    why : str
        The reason, as a sentence after ``Use ...:``.
    switches : tuple of Switch
    break_even_seconds : float or None
        A client's compute below which a `switch` names another strategy.
    against : tuple of str
        Strategies that are out, and why.
    remarks : tuple of str
        What was not measured, and what is emulated.
    """

    use: str | None
    why: str
    as_good: tuple[str, ...] = ()
    switches: tuple[Switch, ...] = ()
    break_even_seconds: float | None = None
    against: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The answer in words."""
        return f"Use {self.use}: {self.why}" if self.use else f"No verdict: {self.why}"

    @property
    def switch(self) -> str | None:
        """When to use another strategy, as a sentence."""
        parts = [f"to {_or(each.to)} if {' or '.join(each.conditions)}" for each in self.switches]
        return f"Switch {' or '.join(parts)}." if parts else None

    @property
    def switch_if(self) -> str:
        """The same for a column that is headed "switch if"."""
        return "; ".join(map(str, self.switches)) or "-"

    @property
    def text(self) -> str:
        """The sentence, and when to switch."""
        return f"{self.sentence} {self.switch}" if self.switch else self.sentence

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON knows it."""
        notes = [*self.against, *self.remarks]
        return asdict(self) | {"sentence": self.sentence, "switch": self.switch, "notes": notes}


def decide(
    table: Sequence[Row], missing: Mapping[str, str] | None = None, busy: str | None = None
) -> Verdict:
    """Judge one workload.

    Parameters
    ----------
    table : sequence of Row
    missing : mapping of str to str, optional
        Strategies that could not be measured here, and why.
    busy : str, optional
        Why the seconds decide nothing.

    Returns
    -------
    Verdict
    """
    reasons = {row.strategy: rules.reason_against(row) for row in table}
    able = sorted((row for row in table if reasons[row.strategy] is None), key=rules.seconds)
    against = tuple(f"Not considered: {names} {reason}." for reason, names in _by_reason(reasons))
    remarks = _remarks(table, able, missing or {})
    if busy:
        return Verdict(use=None, why=f"{busy}.", against=against, remarks=remarks)
    if not able:
        why = "nothing was measured that could be used."
        return Verdict(use=None, why=why, against=against, remarks=remarks)
    return replace(_Judge(table, able).verdict(), against=against, remarks=remarks)


class _Judge:
    """Weighs the strategies that may be recommended: those that give memory back, and those that keep it.

    Parameters
    ----------
    table : sequence of Row
    able : sequence of Row
        Rows that may be recommended, at least one, the fastest first.
    """

    def __init__(self, table: Sequence[Row], able: Sequence[Row]) -> None:
        self._table = table
        self._safe = _without_even_peers([row for row in able if row.gives_back])
        self._keepers = _without_even_peers([row for row in able if not row.gives_back])
        self._keeps = bool(self._keepers) and (
            not self._safe or rules.is_faster(rules.lightest(self._keepers), rules.lightest(self._safe))
        )
        self._safest = self._equals(self._safe, self._keepers)
        self._keeping = self._equals(self._keepers, self._safe)

    def verdict(self) -> Verdict:
        """Return the answer."""
        if not self._safe:
            why = "nothing was measured that gives the memory back"
            return self._made(self._keeping, f"{_rate(self._keeping[0])}{_as_good(self._keeping)}; {why}.")
        return self._keep() if self._keeps else self._give_back()

    def _equals(self, rows: Sequence[Row], others: Sequence[Row]) -> list[Row]:
        """Return the best of rows and all that are as good, the one that is to be recommended first."""
        if not rows:
            return []
        best = rules.lightest(rows)
        rival = rules.lightest(others) if others else best

        def rank(row: Row) -> tuple[bool, bool, bool, float]:
            return rules.is_faster(rival, row), row.strategy != DEFAULT, row.peer, rules.seconds(row)

        return sorted((best, *rules.even(best, rows)), key=rank)

    def _made(
        self, equals: Sequence[Row], why: str, switches: Sequence[Switch] = (), seconds: float | None = None
    ) -> Verdict:
        return Verdict(
            use=equals[0].strategy,
            why=why,
            as_good=_names(equals[1:]),
            switches=tuple(switches),
            break_even_seconds=seconds,
        )

    def _give_back(self) -> Verdict:
        """Recommend one that gives the memory back, and tell below which compute another one pays."""
        chosen, *others = self._safest
        seconds = break_even(chosen, self._keeping[0]) if self._keeping else None
        why = self._why_tie() if others else self._why_first(chosen)
        return self._made(self._safest, why, self._switches(chosen, seconds), seconds)

    def _why_first(self, chosen: Row) -> str:
        rate = _rate(chosen)
        full = [row for row in self._table if row.out_of_memory and row.failed is None and row.isolated]
        faster = [row for row in full if rules.seconds(row) < rules.seconds(chosen)]
        if faster:
            return f"{rate}; {faster[0].strategy} is faster but {rules.reason_against(faster[0])}."
        rival = next(iter(rules.rivals(chosen, self._safe)), None)
        if rival is not None:
            mine, yours = map(numbers.size, rules.peaks(chosen, rival) or (None, None))
            return (
                f"{rate}, as fast as {rival.strategy} inside the noise, with {mine} of memory "
                f"instead of {yours}."
            )
        following = next((row for row in self._safe if row is not chosen), None)
        return f"{rate}, {_more(chosen, following)}." if following else f"{rate}."

    def _why_tie(self) -> str:
        slower = [
            row
            for row in self._safe
            if row not in self._safest
            and not row.peer
            and all(rules.is_faster(one, row) for one in self._safest)
        ]
        together = "both" if len(self._safest) == 2 else "all of them"
        faster = f"; {together} are faster than {slower[0].strategy}" if slower else ""
        return f"{_rate(self._safest[0])}{_as_good(self._safest)}{faster}."

    def _switches(self, chosen: Row, seconds: float | None) -> list[Switch]:
        """Say when a strategy that keeps its workers, or one that takes less memory, is better."""
        found: dict[tuple[str, ...], list[str]] = {}
        if seconds:
            found[_names(self._keeping)] = [f"a client computes for less than {numbers.about(seconds)}"]
        others = sorted((*self._safe, *self._keepers), key=rules.seconds)
        lighter = [row for row in others if rules.is_lighter(row, chosen)]
        light = [row for row in lighter if not any(rules.is_lighter(other, row) for other in lighter)]
        if light:
            light = [light[0], *rules.rivals(light[0], light)]
            _, most = rules.peaks(light[0], chosen) or (None, None)
            found.setdefault(_names(light), []).append(f"memory is below {numbers.size(most)}")
        return [Switch(to, tuple(conditions)) for to, conditions in found.items()]

    def _keep(self) -> Verdict:
        """Recommend one whose workers keep what clients took, and tell when that is too much."""
        keeping, safest = self._keeping[0], self._safest[0]
        seconds = break_even(safest, keeping)
        cause = cause_beyond(safest, keeping, seconds)
        if cause:
            seconds = None
        kept, keeps = keeping.device_residual, f"that {keeping.strategy} keeps"
        needed = f"the {numbers.size(kept)} {keeps} on the device" if kept else f"the memory {keeps}"
        conditions = [f"{needed} must come back after each client"]
        if seconds:
            conditions.append(f"a client computes for more than {numbers.about(seconds)}")
        switches = [Switch(_names(self._safest), tuple(conditions))]
        return self._made(self._keeping, self._why_keep(cause, seconds), switches, seconds)

    def _why_keep(self, cause: str | None, seconds: float | None) -> str:
        keeping, safest = self._keeping[0], self._safest[0]
        safe = _or(_names(self._safest))
        if cause:
            why = f"on {safe} each client costs {cause}"
        elif seconds is not None and keeping.compute is not None:
            why = (
                f"a client computes for {numbers.seconds(keeping.compute)}, and {safe} costs less than "
                f"{numbers.percent(rules.MARGIN)} only from {numbers.about(seconds)} on"
            )
        else:
            why = _more(keeping, safest)
        return f"{_rate(keeping)}{_as_good(self._keeping)}; {why}."


def _without_even_peers(rows: Sequence[Row]) -> list[Row]:
    """Leave out peers that are as fast as the best of our own."""
    own = next((row for row in rows if not row.peer), None)
    if own is None:
        return list(rows)
    return [row for row in rows if not row.peer or row not in rules.rivals(own, rows)]


def _as_good(equals: Sequence[Row]) -> str:
    """Say who is as good as the first, and what decides between them."""
    first, *others = equals
    if not others:
        return ""
    *names, last = _names(others)
    both = f"{', '.join(names)} and {last} are" if names else f"{last} is"
    best = rules.lightest(sorted(equals, key=rules.seconds))
    apart = max(rules.difference(best, row) for row in equals)
    noise = max(rules.margin(best, row) for row in equals if row is not best)
    default = f", and {first.strategy} is the default" if first.strategy == DEFAULT else ""
    differ = f"a difference of {numbers.percent(apart)}, inside the noise of {numbers.percent(noise)}"
    return f"; {both} as good ({differ}){default}"


def _remarks(table: Sequence[Row], able: Sequence[Row], missing: Mapping[str, str]) -> tuple[str, ...]:
    remarks = [f"Not measured: {names} ({reason})." for reason, names in _by_reason(missing)]
    if able and all(row.device_peak is None for row in able):
        remarks.append("Device memory: not measured.")
    emulated = sorted({row.emulated for row in table if row.emulated})
    remarks += [f"Device memory is EMULATED ({how}): no GPU was measured." for how in emulated]
    if any(row.varies for row in able):
        remarks.append("The clients return something else each time: whether results are equal was not told.")
    elif able and any(row.equal is None for row in able):
        remarks.append("Whether the results are equal: not measured everywhere.")
    if able and any(row.contained is None for row in able):
        remarks.append("Whether faults are contained: not measured everywhere.")
    return tuple(remarks)


def _by_reason(reasons: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Return each reason once, and to whom it applies."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            found.setdefault(reason, []).append(name)
    return [(reason, ", ".join(names)) for reason, names in found.items()]


def _names(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(row.strategy for row in rows)


def _or(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _rate(row: Row) -> str:
    return f"{numbers.rate(row.clients_per_second)} clients/s with {numbers.count(row.workers, 'worker')}"


def _more(fast: Row, slow: Row) -> str:
    return f"{numbers.percent(rules.difference(fast, slow))} more than {slow.strategy}"
