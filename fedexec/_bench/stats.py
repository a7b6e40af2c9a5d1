"""Statistics of a benchmark, under the names that pytest-benchmark gives them."""

import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["statistics_of"]


def statistics_of(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the ``stats`` of a benchmark that `fedexec report` and ``pytest-benchmark compare`` read.

    Parameters
    ----------
    seconds : sequence of float
        Duration of each round, in the order they were measured; at least one.

    Returns
    -------
    dict
        Times in seconds; ``ops`` is rounds per second. ``outliers`` counts the rounds further than one
        standard deviation from the mean, and those further than 1.5 interquartile ranges from the quartiles.
    """
    mean = statistics.fmean(seconds)
    deviation = statistics.stdev(seconds) if len(seconds) > 1 else 0.0
    first, third = _quartiles(seconds)
    iqr = third - first
    far = sum(abs(each - mean) > deviation for each in seconds)
    beyond = sum(not first - 1.5 * iqr <= each <= third + 1.5 * iqr for each in seconds)
    return {
        "min": min(seconds),
        "max": max(seconds),
        "mean": mean,
        "stddev": deviation,
        "median": statistics.median(seconds),
        "iqr": iqr,
        "outliers": f"{far};{beyond}",
        "ops": 1 / mean if mean else 0.0,
        "rounds": len(seconds),
        "iterations": 1,
        "data": list(seconds),
    }


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the first and the third quartile as pytest-benchmark defines them.

    They are the medians of the two halves of an even number of rounds, and the mean of the two usual
    definitions for an odd number.
    """
    half, odd = divmod(len(seconds), 2)
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    if not odd:
        ordered = sorted(seconds)
        return statistics.median(ordered[:half]), statistics.median(ordered[half:])
    (low, _, high), (lower, _, higher) = (
        statistics.quantiles(seconds, n=4, method=method) for method in ("inclusive", "exclusive")
    )
    return (low + lower) / 2, (high + higher) / 2
