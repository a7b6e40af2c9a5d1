"""The contents of a caller: large buffers that go to each node once, however many tasks have them."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedexec._channel.held_buffers import Held, copy_buffers, lay_out
from fedexec._channel.messages import THRESHOLD
from fedexec._channel.segments import check_room
from fedexec.cluster.engine import Blob

__all__ = ["Content", "Contents"]

IDLE_SECONDS = 5.0  # after this time a content that no task needs is forgotten


class Content(Held):
    """A copy of large buffers.

    Attributes
    ----------
    number : int
        No other content of this process has it.
    memory : bytearray
    handle : object
        What the engine has made of the memory.
    users : int
        How many tasks need the content now.
    free_since : float
        Time of :func:`time.monotonic` at which the last of them has ended.
    """

    def __init__(self, number: int, size: int) -> None:
        super().__init__()
        self.number = number
        self.memory = bytearray(size)
        self.handle: Any = None
        self.users = 0
        self.free_since = 0.0


class Contents:
    """The contents of one executor. Thread-safe.

    Parameters
    ----------
    put : callable
        :meth:`fedexec.cluster.Engine.put`.
    """

    def __init__(self, put: Callable[[Blob], Any]) -> None:
        self._put = put
        self._numbers = itertools.count(1)
        self._newest = 0
        self._lock = threading.Lock()  # guards everything below
        self._contents: list[Content] = []

    @contextlib.contextmanager
    def lend(self, buffers: Sequence[memoryview], since: float) -> Iterator[Content | None]:
        """Hold buffers while a task needs them; tasks with the same bytes share one content.

        Parameters
        ----------
        buffers : sequence of memoryview
        since : float
            Time of :func:`time.monotonic` from which nobody writes to the buffers.

        Yields
        ------
        Content or None
            None if the buffers are so small that they are better sent with the task.

        Raises
        ------
        TransferError
            There is not enough memory.
        """
        layout, size = lay_out(buffers)
        if size < THRESHOLD:
            yield None
            return
        with self._lock:
            content = next(
                (each for each in self._contents if each.holds(each.memory, 0, layout, buffers, since)), None
            ) or self._new(layout, size, buffers)
            content.users += 1
        try:
            yield content
        finally:
            with self._lock:
                content.users -= 1
                content.free_since = time.monotonic()

    def alive(self) -> tuple[int, tuple[int, ...]]:
        """Forget contents that were not needed for a while; return the newest number, and all others."""
        limit = time.monotonic() - IDLE_SECONDS
        with self._lock:
            self._contents = [each for each in self._contents if each.users or each.free_since > limit]
            return self._newest, tuple(each.number for each in self._contents)

    def close(self) -> None:
        """Forget all contents."""
        with self._lock:
            self._contents.clear()

    def _new(self, layout: tuple[tuple[int, int], ...], size: int, buffers: Sequence[memoryview]) -> Content:
        check_room(size)
        begun = time.monotonic()
        content = Content(next(self._numbers), size)
        copy_buffers(content.memory, layout, buffers)
        content.handle = self._put(Blob(content.memory))
        content.remember(layout, buffers, begun)
        self._newest = content.number
        self._contents.append(content)
        return content
