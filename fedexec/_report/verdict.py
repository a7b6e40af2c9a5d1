"""Which strategy to use, in words, and from where on another one.

How it decides:

1. Out are strategies that isolate nothing, failed, computed something else, lose other clients' work when one
   dies, ran out of memory, or were measured in fewer than three rounds. Each is named with its reason.
2. Of those that give all memory back with each client, the fastest is the *safe* one. What differs by less
   than the noise, and never less than 5 %, is as fast; then the smaller peak of memory decides, if it is
   smaller by more than 10 %; else there is no clear winner.
3. The fastest of all others, by the same rule, is the *keeping* one: its workers keep what clients took.
   Only if it is faster than the safe one by more than that margin, it is the one to use.
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
from dataclasses import asdict, dataclass
from typing import Any

from fedexec._report import numbers
from fedexec._report.table import Row

__all__ = ["Verdict", "decide"]

MARGIN = 0.05  # what no user notices
MEMORY_MARGIN = 0.10
LEAST_ROUNDS = 3
FURTHEST = 20  # times what clients computed: so far a break-even is told


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The answer.

    Attributes
    ----------
    use : str or None
        The strategy; None where there is no clear winner.
    sentence : str
        The answer in words.
    switch : str or None
        When to use another one, in words.
    break_even_seconds : float or None
        A client's compute below which `switch` names another strategy.
    notes : tuple of str
        Who is out and why, what is missing, what is emulated.
    """

    use: str | None
    sentence: str
    switch: str | None = None
    break_even_seconds: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The sentence, and when to switch."""
        return f"{self.sentence} {self.switch}" if self.switch else self.sentence

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON knows it."""
        return asdict(self)


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
    """
    reasons = {row.strategy: _out(row) for row in table}
    able = sorted((row for row in table if reasons[row.strategy] is None), key=_seconds)
    notes = _notes(table, reasons, missing or {})
    if busy:
        return Verdict(use=None, sentence=f"No verdict: {busy}.", notes=notes)
    if not able:
        return Verdict(use=None, sentence="No verdict: nothing was measured that could be used.", notes=notes)
    safe = _without_even_peers([row for row in able if row.gives_back])
    keepers = _without_even_peers([row for row in able if not row.gives_back])
    able = sorted((*safe, *keepers), key=_seconds)
    keeping = _lightest(keepers) if keepers else None
    even_keepers = _even(keeping, keepers) if keeping is not None else []
    if not safe:
        assert keeping is not None
        return _only_keepers(keeping, even_keepers, notes)
    best = _lightest(safe)
    even = _even(best, safe)
    if keeping is not None and _faster(keeping, best):
        return _keep(keeping, even_keepers, best, even, notes)
    rivals = _rivals(best, safe)
    others = [row for row in able if row is not best]
    switch, seconds = _switch(best, keeping, even_keepers, others)
    if even:
        return Verdict(
            use=None,
            sentence=_tie(best, even, others=[row for row in safe if row not in (best, *even)]),
            switch=switch if keeping else None,
            break_even_seconds=seconds,
            notes=notes,
        )
    return Verdict(
        use=best.strategy,
        sentence=_use(best, table, safe, rivals),
        switch=switch,
        break_even_seconds=seconds,
        notes=notes,
    )


def _without_even_peers(rows: Sequence[Row]) -> list[Row]:
    """Leave out peers that are as fast as the best of our own."""
    own = next((row for row in rows if not row.peer), None)
    return [row for row in rows if own is None or not row.peer or _differ(row, own)]


def _seconds(row: Row) -> float:
    return row.round_median or 0.0


def _margin(one: Row, other: Row) -> float:
    return max(MARGIN, one.noise + other.noise)


def _apart(one: Row, other: Row) -> float:
    """Return how much longer the slower of the two takes, as a share."""
    fast, slow = sorted((one, other), key=_seconds)
    return _seconds(slow) / _seconds(fast) - 1


def _differ(one: Row, other: Row) -> bool:
    return _apart(one, other) > _margin(one, other)


def _faster(one: Row, other: Row) -> bool:
    return _seconds(one) < _seconds(other) and _differ(one, other)


def _memory(one: Row, other: Row) -> tuple[int, int] | None:
    """Return the two peaks: of the device where both were measured, else of the host."""
    for key in ("device_peak", "host_peak"):
        mine, yours = getattr(one, key), getattr(other, key)
        if mine is not None and yours is not None and (mine or yours):
            return mine, yours
    return None


def _lighter(one: Row, other: Row) -> bool:
    peaks = _memory(one, other)
    return peaks is not None and peaks[0] < (1 - MEMORY_MARGIN) * peaks[1]


def _lightest(rows: Sequence[Row]) -> Row:
    """Return the fastest; of those as fast, one that takes less memory."""
    best = rows[0]
    for row in rows[1:]:
        if not _differ(rows[0], row) and _lighter(row, best):
            best = row
    return best


def _rivals(best: Row, rows: Sequence[Row]) -> list[Row]:
    """Return who is as fast."""
    return [row for row in rows if row is not best and not _differ(best, row)]


def _even(best: Row, rows: Sequence[Row]) -> list[Row]:
    """Return who is as fast and takes as little memory."""
    return [row for row in _rivals(best, rows) if not _lighter(best, row)]


def _or(rows: Sequence[Row]) -> str:
    *names, last = (row.strategy for row in rows)
    return f"{', '.join(names)} or {last}" if names else last


def _out(row: Row) -> str | None:
    """Return why a strategy cannot be recommended."""
    if row.failed is not None:
        return f"failed in {row.failed}"
    if row.out_of_memory:
        return f"ran out of memory with {row.out_of_memory} of {numbers.count(row.tasks, 'client')}"
    if not row.isolated:
        return "is the baseline: no isolation"
    if row.equal is False:
        return "computed something else"
    if row.contained is False and row.survived_all:
        return "could not go on after one worker died"
    if row.contained is False:
        return f"lost the work of others: when one worker died, {row.survived} other clients finished"
    if row.n < LEAST_ROUNDS:
        return f"only {numbers.count(row.n, 'round')} measured"
    return None


def _notes(
    table: Sequence[Row], reasons: Mapping[str, str | None], missing: Mapping[str, str]
) -> tuple[str, ...]:
    notes = [f"Not considered: {names} {reason}." for reason, names in _by_reason(reasons)]
    notes += [f"Not measured: {names} ({reason})." for reason, names in _by_reason(missing)]
    able = [row for row in table if reasons[row.strategy] is None]
    if able and all(row.device_peak is None for row in able):
        notes.append("Device memory: not measured.")
    emulated = sorted({row.emulated for row in table if row.emulated})
    notes += [f"Device memory is EMULATED ({how}): no GPU was measured." for how in emulated]
    if any(row.varies for row in able):
        notes.append("The clients return something else each time: whether results are equal was not told.")
    elif able and any(row.equal is None for row in able):
        notes.append("Whether the results are equal: not measured everywhere.")
    if able and any(row.contained is None for row in able):
        notes.append("Whether faults are contained: not measured everywhere.")
    return tuple(notes)


def _by_reason(reasons: Mapping[str, str | None]) -> list[tuple[str, str]]:
    """Return each reason once, and to whom it applies."""
    found: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        if reason:
            found.setdefault(reason, []).append(name)
    return [(reason, ", ".join(names)) for reason, names in found.items()]


def _what(row: Row) -> str:
    rate = numbers.rate(row.clients_per_second)
    return f"{row.strategy}: {rate} clients/s with {numbers.count(row.workers, 'worker')}"


def _more(fast: Row, slow: Row) -> str:
    return f"{numbers.percent(_seconds(slow) / _seconds(fast) - 1)} more than {slow.strategy}"


def _use(best: Row, table: Sequence[Row], safe: Sequence[Row], rivals: Sequence[Row]) -> str:
    full = [row for row in table if row.out_of_memory and row.failed is None and row.isolated]
    faster = [row for row in full if _seconds(row) < _seconds(best)]
    if faster:
        return f"Use {_what(best)}; {faster[0].strategy} is faster but {_out(faster[0])}."
    if rivals:
        peaks = _memory(best, rivals[0])
        assert peaks is not None
        mine, yours = map(numbers.size, peaks)
        return (
            f"Use {_what(best)}, as fast as {rivals[0].strategy} inside the noise, "
            f"with {mine} of memory instead of {yours}."
        )
    following = next((row for row in safe if row is not best), None)
    return f"Use {_what(best)}, {_more(best, following)}." if following else f"Use {_what(best)}."


def _tie(best: Row, even: Sequence[Row], others: Sequence[Row]) -> str:
    names = [best.strategy, *(row.strategy for row in even)]
    spread = max(_apart(best, row) for row in even)
    margin = max(_margin(best, row) for row in even)
    sentence = (
        f"No clear winner: {', '.join(names[:-1])} and {names[-1]} differ by {numbers.percent(spread)}, "
        f"inside the noise of {numbers.percent(margin)}"
    )
    slower = [row for row in others if all(_faster(one, row) for one in (best, *even))]
    if slower and len(even) == 1:
        sentence += f"; both are faster than {slower[0].strategy}"
    return f"{sentence}."


def _only_keepers(keeping: Row, even: Sequence[Row], notes: tuple[str, ...]) -> Verdict:
    nothing = "nothing was measured that gives the memory back."
    if even:
        return Verdict(use=None, sentence=f"{_tie(keeping, even, others=[])[:-1]}; {nothing}", notes=notes)
    return Verdict(use=keeping.strategy, sentence=f"Use {_what(keeping)}; {nothing}", notes=notes)


def _keep(
    keeping: Row, even: Sequence[Row], best: Row, even_best: Sequence[Row], notes: tuple[str, ...]
) -> Verdict:
    seconds = _break_even(best, keeping)
    safe = _or([best, *even_best])
    compute = f"a client's compute of {numbers.seconds(keeping.compute)}" if keeping.compute else "compute"
    cause = _cause_beyond(best, keeping, seconds)
    if cause:
        why, seconds = f"on {safe} each client costs {cause}", None
    elif seconds is not None and keeping.compute is not None:
        margin = numbers.percent(MARGIN)
        why = f"{compute} is below the {numbers.about(seconds)} from which on {safe} costs less than {margin}"
    else:
        why = _more(keeping, best)
    kept = keeping.device_residual
    keep = "they keep" if even else "it keeps"
    needed = f"the {numbers.size(kept)} that {keep} on the device" if kept else f"the memory that {keep}"
    above = f" or a client computes longer than {numbers.about(seconds)}" if seconds else ""
    return Verdict(
        use=None if even else keeping.strategy,
        sentence=_tie(keeping, even, others=[best]) if even else f"Use {_what(keeping)}; {why}.",
        switch=f"Switch to {safe} if {needed} must come back after each client{above}.",
        break_even_seconds=seconds,
        notes=notes,
    )


def _cause_beyond(safe: Row, keeping: Row, seconds: float | None) -> str | None:
    """Return what a client of `safe` costs more, where its break-even is too far from what was measured."""
    if seconds is None or not keeping.compute or seconds <= FURTHEST * keeping.compute:
        return None
    extra = (_seconds(safe) - _seconds(keeping)) * safe.workers / safe.clients
    imports = (safe.imports or 0.0) - (keeping.imports or 0.0)
    if imports >= extra / 2:
        of_it = f"{numbers.about(imports)} of it for imports, which preload= would spare"
        return f"{numbers.about(extra)} more, {of_it}"
    return f"{numbers.about(extra)} more, for its process"


def _switch(
    best: Row, keeping: Row | None, even: Sequence[Row], others: Sequence[Row]
) -> tuple[str | None, float | None]:
    """Say when another strategy is better than the best, if ever."""
    seconds = _break_even(best, keeping) if keeping is not None else None
    lighter = [row for row in others if _lighter(row, best)]
    light = [row for row in lighter if not any(_lighter(other, row) for other in lighter)]
    light = [row for row in light if row is light[0] or not _differ(light[0], row)]  # by their seconds
    parts = []
    if seconds and keeping is not None:
        parts.append(f"to {_or([keeping, *even])} if a client's compute is below {numbers.about(seconds)}")
    if light:
        peaks = _memory(light[0], best)
        assert peaks is not None
        target = "" if parts and light == [keeping, *even] else f"to {_or(light)} if "
        parts.append(f"{target}memory is below {numbers.size(peaks[1])}")
    return (f"Switch {' or '.join(parts)}." if parts else None), seconds


def _break_even(safe: Row, keeping: Row) -> float | None:
    """Return the compute of a client from which on `safe` costs less than the margin; None if always."""
    if _faster(keeping, safe):
        slots = safe.workers / safe.clients
        extra = (_seconds(safe) - _seconds(keeping)) * slots
        other = 0.0  # seconds a client that `keeping` needs beside its compute
        if keeping.compute is not None:
            other = max(0.0, _seconds(keeping) * slots - keeping.compute)
        return extra / MARGIN - other
    if _faster(safe, keeping) or safe.warm is None or keeping.warm is None:
        return None
    seconds = (safe.warm - keeping.warm) / MARGIN - keeping.warm
    is_below = keeping.compute is None or seconds < keeping.compute  # which was computed as fast
    return seconds if seconds > 0 and is_below else None
