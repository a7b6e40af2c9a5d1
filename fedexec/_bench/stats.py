"""The statistics of pytest-benchmark, computed where it is not installed."""

import statistics
from collections.abc import Sequence
from typing import Any

__all__ = ["statistics_of"]


def statistics_of(seconds: Sequence[float]) -> dict[str, Any]:
    """Return what pytest-benchmark writes as ``stats``.

    Parameters
    ----------
    seconds : sequence of float
        Of each round, at least one.
    """
    ordered = sorted(seconds)
    mean, rounds, total = statistics.mean(ordered), len(ordered), sum(ordered)
    stddev = statistics.stdev(ordered) if rounds > 1 else 0
    q1, q3 = _quartiles(ordered)
    iqr = q3 - q1
    low, high = q1 - 1.5 * iqr, q3 + 1.5 * iqr
    inside = [value for value in ordered if low <= value <= high]
    beyond = sum(value < mean - stddev or value > mean + stddev for value in ordered)
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": mean,
        "stddev": stddev,
        "rounds": rounds,
        "median": statistics.median(ordered),
        "iqr": iqr,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": rounds - len(inside),
        "stddev_outliers": beyond,
        "outliers": f"{beyond};{rounds - len(inside)}",
        "ld15iqr": inside[0],
        "hd15iqr": inside[-1],
        "ops": rounds / total if total else 0,
        "total": total,
        "data": list(seconds),
        "iterations": 1,
    }


def _quartiles(ordered: Sequence[float]) -> tuple[float, float]:
    """Return the quartiles: of an odd number the mean of the two usual definitions, as pytest-benchmark."""
    rounds = len(ordered)
    if rounds == 1:
        return ordered[0], ordered[0]
    n, rest = divmod(rounds, 4)
    if rest in (0, 2):
        half = rounds // 2
        return statistics.median(ordered[:half]), statistics.median(ordered[half:])
    if rest == 1:
        return (
            0.25 * ordered[n - 1] + 0.75 * ordered[n],
            0.75 * ordered[3 * n] + 0.25 * ordered[3 * n + 1],
        )
    return (
        0.75 * ordered[n] + 0.25 * ordered[n + 1],
        0.25 * ordered[3 * n + 1] + 0.75 * ordered[3 * n + 2],
    )
