"""Helpers of :meth:`fedexec.Executor.map`: chunks of items, and results in order."""

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from fedexec._scheduling.futures import Future

__all__ = ["buffered", "call_each", "check", "chunks", "flatten"]

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


def check(chunksize: int, buffersize: int | None) -> None:
    """Raise an error if a size makes no sense; the messages are those of :mod:`concurrent.futures`.

    Parameters
    ----------
    chunksize : int
    buffersize : int or None
    """
    if chunksize < 1:
        raise ValueError("chunksize must be >= 1.")
    if buffersize is not None and not isinstance(buffersize, int):
        raise TypeError("buffersize must be an integer or None")
    if buffersize is not None and buffersize < 1:
        raise ValueError("buffersize must be None or > 0")


def buffered(futures: Iterator[Future[T]], size: int, timeout: float | None) -> Iterator[T]:
    """Submit some tasks now, and return an iterator that submits one more before it yields a result.

    Parameters
    ----------
    futures : iterator of Future
        Submits one task for each future.
    size : int
        How many tasks are submitted now.
    timeout : float or None
        Seconds from now after which ``next`` raises TimeoutError.

    Returns
    -------
    iterator
        The results in order. It keeps no reference to them.
    """
    end = math.inf if timeout is None else time.monotonic() + timeout
    return _yield_results(futures, deque(itertools.islice(futures, size)), end)


def _yield_results(futures: Iterator[Future[T]], submitted: deque[Future[T]], end: float) -> Iterator[T]:
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
