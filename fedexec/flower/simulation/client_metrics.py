"""What clients have measured, read from their replies, for strategies that do not aggregate it."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Message

__all__ = ["metrics_of_replies", "weighted_means"]

EXAMPLES = "num-examples"  # by Flower's convention the weight of a reply


def metrics_of_replies(replies: Iterable[Any]) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Yield the metrics of each reply that is not an error, and its number of examples.

    Parameters
    ----------
    replies : iterable
        Messages or, in an older app, pairs of a client and its result.

    Yields
    ------
    tuple of (mapping, float)
    """
    for reply in replies:
        if isinstance(reply, Message):
            if reply.has_content():
                metrics = {
                    name: value
                    for each in reply.content.metric_records.values()
                    for name, value in each.items()
                }
                yield metrics, metrics.get(EXAMPLES, 1)  # type: ignore[misc]
        elif isinstance(reply, tuple) and hasattr(reply[-1], "metrics"):
            yield reply[-1].metrics or {}, reply[-1].num_examples


def weighted_means(seen: Iterable[tuple[Mapping[str, Any], float]]) -> dict[str, float]:
    """Return the mean of each number over the replies that have it, weighted by their examples.

    Parameters
    ----------
    seen : iterable of tuple of (mapping, float)

    Returns
    -------
    dict
    """
    sums: dict[str, list[float]] = {}
    for metrics, weight in seen:
        if not isinstance(weight, int | float) or not weight > 0:
            continue
        for name, value in metrics.items():
            if name != EXAMPLES and isinstance(value, int | float) and not isinstance(value, bool):
                total = sums.setdefault(name, [0.0, 0.0])
                with contextlib.suppress(OverflowError):  # whole numbers may have any size
                    total[:] = total[0] + float(weight * value), total[1] + float(weight)
    return {name: total / weights for name, (total, weights) in sums.items() if weights}
