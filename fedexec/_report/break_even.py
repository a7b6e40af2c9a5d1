"""From which compute of a client on a fresh process costs next to nothing, and what it costs below that."""

from fedexec._report import numbers, rules
from fedexec._report.table import Row

__all__ = ["break_even", "cause_beyond"]

FURTHEST = 20  # A break-even that is so many times more, or less, than what clients computed is not told.


def break_even(safe: Row, keeping: Row) -> float | None:
    """Return the compute of a client from which on `safe` costs less than the margin over `keeping`.

    Parameters
    ----------
    safe : Row
        A strategy that gives all memory back with each client.
    keeping : Row
        One whose workers keep what clients took.

    Returns
    -------
    float or None
        Seconds; None if `safe` costs less than the margin whatever a client computes, or if the break-even
        is so far below what clients computed that nothing measured tells it.
    """
    if rules.is_faster(keeping, safe):
        turns = safe.workers / safe.clients
        other = 0.0  # seconds a client that `keeping` needs beside its compute
        if keeping.compute is not None:
            other = max(0.0, rules.seconds(keeping) * turns - keeping.compute)
        return _extra(safe, keeping) / rules.MARGIN - other
    if rules.is_faster(safe, keeping) or safe.warm is None or keeping.warm is None:
        return None
    # What a task costs that does nothing tells little of clients that compute: it is taken only nearby.
    seconds = (safe.warm - keeping.warm) / rules.MARGIN - keeping.warm
    is_near = keeping.compute is None or keeping.compute / FURTHEST <= seconds < keeping.compute
    return seconds if seconds > 0 and is_near else None


def cause_beyond(safe: Row, keeping: Row, seconds: float | None) -> str | None:
    """Return what a client of `safe` costs more, where its break-even is too far from what was measured.

    Parameters
    ----------
    safe, keeping : Row
    seconds : float or None
        Their break-even.

    Returns
    -------
    str or None
        The extra time and its cause in words; None where the break-even can be told.
    """
    if seconds is None or not keeping.compute or seconds <= FURTHEST * keeping.compute:
        return None
    extra = _extra(safe, keeping)
    imports = (safe.imports or 0.0) - (keeping.imports or 0.0)
    if imports >= extra / 2:
        of_it = f"{numbers.about(imports)} of it for imports, which preload= would spare"
        return f"{numbers.about(extra)} more, {of_it}"
    return f"{numbers.about(extra)} more, for its process"


def _extra(safe: Row, keeping: Row) -> float:
    """Return the seconds that a client of `safe` takes longer."""
    return (rules.seconds(safe) - rules.seconds(keeping)) * safe.workers / safe.clients
