"""Statistics of a benchmark, under the names that pytest-benchmark gives them."""

import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["statistics_of"]


def statistics_of(seconds: Sequence[float]) -> dict[str, Any]:
    """Return what `fedexec report` reads of pytest-benchmark's ``stats``.

    Parameters
    ----------
    seconds : sequence of float
        Duration of each round, in the order they were measured; at least one.

    Returns
    -------
    dict
        ``rounds``; ``median`` and ``iqr``, the distance between the quartiles, in seconds; and ``data``, the
        durations themselves.
    """
    return {
        "rounds": len(seconds),
        "median": statistics.median(seconds),
        "iqr": _interquartile_range(seconds),
        "data": list(seconds),
    }


def _interquartile_range(seconds: Sequence[float]) -> float:
    """Return the mean of the two usual definitions: pytest-benchmark's own for an odd number of rounds."""
    if len(seconds) < 2:
        return 0.0
    ranges = []
    for method in ("inclusive", "exclusive"):
        low, _, high = statistics.quantiles(seconds, n=4, method=method)
        ranges.append(high - low)
    return statistics.mean(ranges)
