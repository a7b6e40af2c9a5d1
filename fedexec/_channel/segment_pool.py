"""The segments of one executor: which one holds what, which is free, and when one goes back to the system.

They are reused, because touching fresh memory costs more than copying. What lies in one already is not
written again: ten clients of a round that get the same weights share one segment.
"""

import ctypes
import math
import os
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

from fedexec._channel.messages import THRESHOLD, TaskMessage
from fedexec._channel.pickling import dump, loads
from fedexec._channel.segments import TOO_MANY_FILES, Segment, check_room, lay_out

__all__ = ["Parcel", "SegmentPool"]

KEPT_RESULTS = 64  # that keep their segment, to be reused; the memory of more goes when they are dropped
IDLE_SECONDS = 2.0  # after which a segment nobody uses is given back to the system


class SegmentPool:
    """The segments of one executor, in the caller's process. Safe to use from many threads.

    Parameters
    ----------
    enabled : bool
        Else buffers travel in the message.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._returned: deque[Segment] = deque()  # appended by finalizers, which must not take a lock
        self._trimmer: threading.Thread | None = None
        self._closed = threading.Event()

    def parcel(
        self,
        obj: Any,
        since: float = math.inf,
        device: str | None = None,
        stderr: str | None = None,
        seed: int | None = None,
        path: tuple[str, ...] | None = None,
        learn: Callable[[bytes], object] | None = None,
    ) -> "Parcel":
        """Pack an object to be sent.

        Parameters
        ----------
        obj : object
        since : float
            Time of :func:`time.monotonic` from which nobody writes to its buffers.
        device : str, optional
            UUID of the device that the receiver is to compute on.
        stderr : str, optional
            Where the receiver is to write its stderr.
        seed : int, optional
            What the receiver's random numbers are to follow from.
        path : tuple of str, optional
            The ``sys.path`` by which the receiver is to find modules.
        learn : callable, optional
            Given the pickled object, without its buffers. The receiver then tells what it imports.

        Raises
        ------
        TransferError
            There is not enough memory for its buffers.
        """
        data, buffers, sources = dump(obj, with_main=True)
        if learn is not None:
            learn(data)
        layout, size = lay_out(buffers)
        where: dict[str, Any] = {
            "device": device,
            "stderr": stderr,
            "seed": seed,
            "path": path,
            "learns": learn is not None,
            "sources": sources,
        }
        if not self._enabled:
            if size >= THRESHOLD:
                check_room(size)
            message = TaskMessage(data, tuple(map(bytes, buffers)), **where)
            return Parcel(pickle.dumps(message), self, None, None)
        back, there = None, None
        try:
            back = self._take(size)
            there = self._place(layout, size, buffers, since) if size >= THRESHOLD else None
        except OSError as exc:
            if exc.errno not in TOO_MANY_FILES:
                raise
            if back is not None:
                self.release(back)
            back = None  # Without descriptors everything travels in the message.
        if back is None or there is None:
            inside = tuple(map(bytes, buffers))
            message = TaskMessage(data, inside, answer=None if back is None else back.place, **where)
            return Parcel(pickle.dumps(message), self, None, back)
        message = TaskMessage(data, place=there.place, layout=layout, answer=back.place, **where)
        return Parcel(pickle.dumps(message), self, there, back)

    def disable(self) -> bool:
        """Send everything in messages from now on; return whether that is new."""
        with self._lock:
            was_enabled, self._enabled = self._enabled, False
        return was_enabled

    def used_bytes(self) -> int:
        """Return how much memory the segments take, those that wait to be reused included."""
        with self._lock:
            return sum(os.fstat(segment.fd).st_blocks * 512 for segment in self._segments)

    def close(self) -> None:
        """Give everything back that no view of a result still needs."""
        self._closed.set()
        with self._lock:
            for segment in self._segments:
                segment.close()
            self._segments.clear()
        if self._trimmer is not None:
            self._trimmer.join()

    # ------------------------------------------------------------ for parcels

    def release(self, segment: Segment) -> None:
        """Note that one user less needs a segment; from any thread, and from finalizers."""
        self._returned.append(segment)

    def view(self, segment: Segment, size: int) -> memoryview:
        """Look at a segment; when the last view derived from this one is gone, it is released.

        Beyond a few results that are kept, a segment gives its descriptor up and is not used again: whoever
        collects the updates of a thousand clients needs no thousand descriptors.
        """
        memory = segment.fit(size)
        exporter = (ctypes.c_char * size).from_buffer(memory, segment.start)
        weakref.finalize(exporter, self.release, segment).atexit = False
        with self._lock:
            self._collect()
            segment.viewed = True
            if segment in self._segments and sum(each.viewed for each in self._segments) > KEPT_RESULTS:
                self._segments.remove(segment)
                segment.close()
        return memoryview(exporter).cast("B")

    # ------------------------------------------------------------ which segment

    def _place(
        self, layout: tuple[tuple[int, int], ...], size: int, buffers: list[memoryview], since: float
    ) -> Segment:
        """Return a segment in which these buffers lie, written now or before."""
        with self._lock:
            self._collect()
            for segment in self._segments:
                if segment.holds(layout, buffers, since):
                    segment.users += 1
                    return segment
            segment = self._free_segment(size)
            segment.write(layout, size, buffers)
            return segment

    def _take(self, size: int) -> Segment:
        """Return a segment for a result, rather one that has `size` bytes already."""
        with self._lock:
            self._collect()
            segment = self._free_segment(size, reserve=False)
            segment.forget()
            return segment

    def _free_segment(self, size: int, *, reserve: bool = True) -> Segment:
        free = [segment for segment in self._segments if not segment.users]
        if not reserve:  # a result goes rather where nothing lies that may be sent again
            free = [segment for segment in free if not segment.layout] or free
        enough = [segment for segment in free if segment.size >= size]
        if enough:
            segment = min(enough, key=lambda segment: segment.size)
        else:
            if reserve:
                check_room(size)
            segment = max(free, key=lambda segment: segment.size) if free else self._new_segment()
        segment.users += 1
        return segment

    def _new_segment(self) -> Segment:
        segment = Segment()
        self._segments.append(segment)
        if self._trimmer is None:
            self._trimmer = threading.Thread(target=self._trim, name="fedexec-segments", daemon=True)
            self._trimmer.start()
        return segment

    def _collect(self) -> None:
        now = time.monotonic()
        while self._returned:
            segment = self._returned.popleft()
            segment.users -= 1
            segment.free_since = now
            segment.viewed = False
            if segment.kept and not segment.users and segment in self._segments:
                self._segments.remove(segment)
                segment.close()

    def _trim(self) -> None:
        """Give back, after a while, what nobody uses."""
        while not self._closed.wait(IDLE_SECONDS / 2):
            with self._lock:
                self._collect()
                limit = time.monotonic() - IDLE_SECONDS
                for segment in [s for s in self._segments if not s.users and s.free_since < limit]:
                    self._segments.remove(segment)
                    segment.close()


class Parcel:
    """A packed object on its way there, and its answer on the way back. A context manager.

    Attributes
    ----------
    message : bytes
    """

    def __init__(
        self, message: bytes, pool: SegmentPool, there: Segment | None, back: Segment | None
    ) -> None:
        self.message = message
        self._pool = pool
        self._there = there
        self._back = back

    def __enter__(self) -> "Parcel":
        return self

    def keep(self) -> None:
        """Note that the worker goes on looking at what it was sent."""
        if self._there is not None:
            self._there.kept = True

    def __exit__(self, *exc_info: object) -> None:
        """Release what was lent. Only when the worker no longer reads or writes it."""
        for segment in (self._there, self._back):
            if segment is not None:
                self._pool.release(segment)

    def open(self, data: bytes) -> Any:
        """Read an answer. Arrays are writable views of its segment, which comes back when they are gone."""
        message: TaskMessage = pickle.loads(data)
        if message.place is None:
            return loads(message.data, map(bytearray, message.buffers))
        assert self._back is not None
        end = max(offset + size for offset, size in message.layout)
        memory = self._pool.view(self._back, end)
        self._back = None  # the views hold it now
        return loads(message.data, [memory[offset : offset + size] for offset, size in message.layout])
