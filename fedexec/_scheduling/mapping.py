"""Helpers of :meth:`fedexec.Executor.map`: chunks of items, and results in order."""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from fedexec._scheduling.futures import Future

__all__ = ["buffered", "call_each", "chunks", "flatten"]

T = TypeVar("T")


def call_each(fn: Callable[..., T], chunk: Sequence[tuple[Any, ...]]) -> list[T]:
    """Call a function once with each tuple of arguments.

    Parameters
    ----------
    fn : callable
    chunk : sequence of tuple

    Returns
    -------
    list
        The results.
    """
    return [fn(*args) for args in chunk]


def chunks(items: Iterator[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Yield tuples of at most `size` items.

    Parameters
    ----------
    items : iterator
    size : int
        Number of items.
    """
    while chunk := tuple(itertools.islice(items, size)):
        yield chunk


def flatten(lists: Iterator[list[T]]) -> Iterator[T]:
    """Yield each element of each list, without keeping a reference to elements that were yielded.

    Parameters
    ----------
    lists : iterator of list
    """
    for elements in lists:
        elements.reverse()
        while elements:
            yield elements.pop()


def buffered(futures: Iterator[Future[T]], submitted: deque[Future[T]], end: float) -> Iterator[T]:
    """Yield the results in order, without keeping references to them; before each, submit one more task.

    Parameters
    ----------
    futures : iterator of Future
        Submits one task for each future.
    submitted : deque of Future
        Futures of the tasks that have been submitted already.
    end : float
        Time of :func:`time.monotonic` after which TimeoutError is raised; infinite if there is no limit.
    """
    try:
        while submitted:
            submitted.extend(itertools.islice(futures, 1))
            yield _result(submitted, end)
    finally:
        for future in submitted:
            future.cancel()


def _result(submitted: deque[Future[T]], end: float) -> T:
    """Return the result of the first future and remove it; after an error it stays and is cancelled."""
    result = submitted[0].result(None if end == math.inf else end - time.monotonic())
    submitted.popleft()
    return result
