"""What tells two strategies apart: time beyond the noise, memory beyond a margin, and what rules one out."""

from collections.abc import Sequence

from fedexec._report import numbers
from fedexec._report.table import Row

__all__ = [
    "MARGIN",
    "MEMORY_MARGIN",
    "difference",
    "even",
    "is_faster",
    "is_lighter",
    "lightest",
    "margin",
    "peaks",
    "reason_against",
    "rivals",
    "seconds",
]

MARGIN = 0.05  # a smaller difference in time nobody notices
MEMORY_MARGIN = 0.10
LEAST_ROUNDS = 3


def seconds(row: Row) -> float:
    """Return the median duration of a round."""
    return row.round_median or 0.0


def margin(one: Row, other: Row) -> float:
    """Return the difference in time, as a share, below which two strategies are as fast as each other."""
    return max(MARGIN, one.noise + other.noise)


def difference(one: Row, other: Row) -> float:
    """Return how much longer the slower of the two takes, as a share."""
    fast, slow = sorted((one, other), key=seconds)
    return seconds(slow) / seconds(fast) - 1


def is_faster(one: Row, other: Row) -> bool:
    """Whether the first is faster than the second, beyond the noise."""
    return seconds(one) < seconds(other) and _differ(one, other)


def _differ(one: Row, other: Row) -> bool:
    return difference(one, other) > margin(one, other)


def peaks(one: Row, other: Row) -> tuple[int, int] | None:
    """Return the peaks of both in bytes: of the device where both were measured, else of the host."""
    for key in ("device_peak", "host_peak"):
        first, second = getattr(one, key), getattr(other, key)
        if first is not None and second is not None and (first or second):
            return first, second
    return None


def is_lighter(one: Row, other: Row) -> bool:
    """Whether the first takes less memory than the second, beyond the margin."""
    both = peaks(one, other)
    return both is not None and both[0] < (1 - MEMORY_MARGIN) * both[1]


def lightest(rows: Sequence[Row]) -> Row:
    """Return the fastest of rows that are sorted by time; of those as fast, one that takes less memory."""
    best = rows[0]
    for row in rows[1:]:
        if not _differ(rows[0], row) and is_lighter(row, best):
            best = row
    return best


def rivals(best: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the other rows that are as fast."""
    return [row for row in rows if row is not best and not _differ(best, row)]


def even(best: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the other rows that are as fast and take as little memory."""
    return [row for row in rivals(best, rows) if not is_lighter(best, row)]


def reason_against(row: Row) -> str | None:
    """Return why a strategy must not be recommended, however fast it is; None if it may be."""
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
