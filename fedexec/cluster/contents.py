"""The contents of a caller: large buffers that go to each node once, however many tasks have them."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedexec._channel.held_buffers import Held, copy_buffers, lay_out
from fedexec._channel.messages import THRESHOLD
from fedexec._channel.segments import check_room
from fedexec.cluster.engine import Blob

__all__ = ["Content", "Contents", "Lent"]

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


@dataclass(frozen=True, slots=True)
class Lent:
    """The buffers of one task.

    Attributes
    ----------
    buffers : tuple
        As in :class:`~fedexec.cluster.messages.NodeTask`.
    contents : sequence of Content
        What holds the large ones.
    """

    buffers: tuple[Any, ...]
    contents: Sequence[Content]


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
    def lend(self, buffers: Sequence[memoryview], since: float) -> Iterator[Lent]:
        """Hold buffers while a task needs them; tasks with the same bytes share a content.

        Each large buffer is a content of its own, so that an array that all tasks have goes to a node once,
        although each task has others besides. The small ones are one content, if they are large together.

        Parameters
        ----------
        buffers : sequence of memoryview
        since : float
            Time of :func:`time.monotonic` from which nobody writes to the buffers.

        Yields
        ------
        Lent

        Raises
        ------
        TransferError
            There is not enough memory.
        """
        small = [index for index, buffer in enumerate(buffers) if buffer.nbytes < THRESHOLD]
        groups = [[index] for index, buffer in enumerate(buffers) if buffer.nbytes >= THRESHOLD]
        if sum(buffers[index].nbytes for index in small) >= THRESHOLD:
            groups.append(small)
        described: list[Any] = [None] * len(buffers)
        contents: list[Content] = []
        try:
            for group in groups:
                contents.append(self._take([buffers[index] for index in group], since))
                for index, place in zip(group, contents[-1].layout, strict=True):
                    described[index] = (contents[-1].number, *place)
            for index, buffer in enumerate(buffers):
                described[index] = described[index] or bytes(buffer)
            yield Lent(tuple(described), contents)
        finally:
            with self._lock:
                for content in contents:
                    content.users -= 1
                    content.free_since = time.monotonic()

    def _take(self, buffers: Sequence[memoryview], since: float) -> Content:
        """Return a content with these bytes, which is made if there is none."""
        layout, size = lay_out(buffers)
        with self._lock:
            for content in self._contents:
                if content.holds(content.memory, 0, layout, buffers, since):
                    break
            else:
                content = self._new(layout, size, buffers)
            content.users += 1
            return content

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
