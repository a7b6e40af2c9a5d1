"""The segments of one executor: which holds what, which is free, and when a segment is given back.

Segments are reused, because writing to fresh memory costs more than copying. Arrays that a segment holds
already are not written again: ten clients of a round that get the same weights share one segment.
"""

import ctypes
import functools
import math
import os
import pickle
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence

from fedexec._channel.held_buffers import lay_out
from fedexec._channel.messages import THRESHOLD, TaskMessage
from fedexec._channel.pickling import Packed, dump
from fedexec._channel.segments import TOO_MANY_FILES, Segment, check_room

__all__ = ["Parcel", "SegmentPool"]

KEPT_RESULTS = 64  # this many results keep a segment that can be reused; segments of further results cannot
IDLE_SECONDS = 2.0  # after this time a segment that is not in use is given back to the system


class SegmentPool:
    """The segments of one executor, in the caller's process. Thread-safe.

    Parameters
    ----------
    enabled : bool
        Whether to use segments; if not, buffers are part of the message.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._enabled = enabled
        self._lock = threading.Lock()
        self._segments: list[Segment] = []
        self._returned: deque[Segment] = deque()  # finalizers append to it, because they must not take a lock
        self._trimmer: threading.Thread | None = None
        self._closed = threading.Event()

    def parcel(
        self,
        obj: object,
        since: float = math.inf,
        device: str | None = None,
        stderr: str | None = None,
        seed: int | None = None,
        path: tuple[str, ...] | None = None,
        learn: Callable[[bytes], object] | None = None,
        stdout: str | None = None,
        threads: int | None = None,
    ) -> "Parcel":
        """Pack an object to be sent.

        Parameters
        ----------
        obj : object
            If it is :class:`~fedexec._channel.pickling.Packed`, it has been pickled already.
        since : float
            Time of :func:`time.monotonic` from which nobody writes to the buffers of the object.
        device : str, optional
            UUID of the device on which the receiver has to compute.
        stderr : str, optional
            Path to which the receiver has to write its stderr.
        seed : int, optional
            Seed of the receiver's random generators.
        path : tuple of str, optional
            The ``sys.path`` with which the receiver has to find modules.
        learn : callable, optional
            ``learn(data)`` is called with the pickled object, without its buffers. If this is given, the
            reply says which modules the receiver has imported.
        stdout : str, optional
            Path to which the receiver has to write its stdout.
        threads : int, optional
            How many threads the receiver's libraries may use.

        Returns
        -------
        Parcel

        Raises
        ------
        TransferError
            There is not enough memory for the buffers of the object.
        """
        data, buffers, sources = obj if isinstance(obj, Packed) else dump(obj, with_main=True)
        if learn is not None:
            learn(data)
        layout, size = lay_out(buffers)
        make = functools.partial(
            TaskMessage,
            device=device,
            stderr=stderr,
            stdout=stdout,
            seed=seed,
            threads=threads,
            path=path,
            learns=learn is not None,
            sources=sources,
        )
        if not self._enabled:
            if size >= THRESHOLD:
                check_room(size)
            message = make(data, tuple(map(bytes, buffers)))
            return Parcel(pickle.dumps(message), self, None, None)
        back, there = self._borrow(layout, size, buffers, since)
        if back is None or there is None:
            inside = tuple(map(bytes, buffers))
            message = make(data, inside, answer=None if back is None else back.place)
            return Parcel(pickle.dumps(message), self, None, back)
        message = make(data, place=there.place, layout=layout, answer=back.place)
        return Parcel(pickle.dumps(message), self, there, back)

    def disable(self) -> bool:
        """Send all buffers in messages from now on; return whether segments were used until now."""
        with self._lock:
            was_enabled, self._enabled = self._enabled, False
        return was_enabled

    def used_bytes(self) -> int:
        """Return how many bytes the segments take, including segments that wait to be reused."""
        with self._lock:
            return sum(os.fstat(segment.fd).st_blocks * 512 for segment in self._segments)

    def close(self) -> None:
        """Give back all segments that no view of a result needs any more."""
        self._closed.set()
        with self._lock:
            for segment in self._segments:
                segment.close()
            self._segments.clear()
        if self._trimmer is not None:
            self._trimmer.join()

    # ------------------------------------------------------------ for parcels

    def release(self, segment: Segment) -> None:
        """Note that a segment has one user less; any thread and any finalizer may call this.

        Parameters
        ----------
        segment : Segment
        """
        self._returned.append(segment)

    def view(self, segment: Segment, size: int) -> memoryview:
        """Return a view of a segment; the segment is released when the last view derived from it is gone.

        If many results are kept, the segment also gives up its descriptor and is not reused, so that a
        caller who collects the updates of a thousand clients does not need a thousand descriptors.

        Parameters
        ----------
        segment : Segment
        size : int
            Length of the view in bytes.

        Returns
        -------
        memoryview
            Of bytes, writable.
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

    # ------------------------------------------------------------ which segment to use

    def _borrow(
        self, layout: tuple[tuple[int, int], ...], size: int, buffers: Sequence[memoryview], since: float
    ) -> tuple[Segment | None, Segment | None]:
        """Return segments for the result and for the buffers; None if the message has to carry them."""
        back, there = None, None
        try:
            back = self._take(size)
            there = self._place(layout, size, buffers, since) if size >= THRESHOLD else None
        except OSError as exc:
            if exc.errno not in TOO_MANY_FILES:
                raise
            if back is not None:
                self.release(back)
            back = None  # without descriptors the message carries all buffers
        return back, there

    def _place(
        self, layout: tuple[tuple[int, int], ...], size: int, buffers: Sequence[memoryview], since: float
    ) -> Segment:
        """Return a segment that holds these buffers, which are written to it unless it held them already."""
        with self._lock:
            self._collect()
            for segment in self._segments:
                if segment.memory is not None and segment.holds(
                    segment.memory, segment.start, layout, buffers, since
                ):
                    segment.users += 1
                    return segment
            segment = self._free_segment(size)
            segment.write(layout, size, buffers)
            return segment

    def _take(self, size: int) -> Segment:
        """Return a segment for a result, if possible one that has `size` bytes already."""
        with self._lock:
            self._collect()
            segment = self._free_segment(size, reserve=False)
            segment.forget()
            return segment

    def _free_segment(self, size: int, *, reserve: bool = True) -> Segment:
        free = [segment for segment in self._segments if not segment.users]
        if not reserve:  # for a result, prefer a segment without buffers that may be sent again
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
        """Give back segments that have not been used for a while."""
        while not self._closed.wait(IDLE_SECONDS / 2):
            with self._lock:
                self._collect()
                limit = time.monotonic() - IDLE_SECONDS
                for segment in [
                    each for each in self._segments if not each.users and each.free_since < limit
                ]:
                    self._segments.remove(segment)
                    segment.close()


class Parcel:
    """A packed object on its way to a worker, and the way back for the result. A context manager.

    The segments are released at the end of the context, so the worker must have stopped using them then.

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
        """Note that the worker keeps views of the segment that it was sent, so it must not be reused."""
        if self._there is not None:
            self._there.kept = True

    def __exit__(self, *exc_info: object) -> None:
        """Release the segments. Only when the worker no longer reads or writes them."""
        for segment in (self._there, self._back):
            if segment is not None:
                self._pool.release(segment)

    def open(self, data: bytes) -> Packed:
        """Read a packed result.

        Parameters
        ----------
        data : bytes
            As :meth:`Delivery.answer <fedexec._channel.messages.Delivery.answer>` has returned it.

        Returns
        -------
        Packed
            Its buffers are writable; large ones are views of a segment, which is released when the last view
            is gone.
        """
        message: TaskMessage = pickle.loads(data)
        if message.place is None:
            return Packed(message.data, [memoryview(bytearray(buffer)) for buffer in message.buffers])
        assert self._back is not None
        end = max(offset + size for offset, size in message.layout)
        memory = self._pool.view(self._back, end)
        self._back = None  # the views release the segment
        return Packed(message.data, [memory[offset : offset + size] for offset, size in message.layout])
