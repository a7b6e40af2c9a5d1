"""Arrays between processes through shared memory: pickle protocol 5 with the buffers out of band.

A message is bytes that any channel can carry, a pipe, a queue, a Manager. Where an object's buffers (of
ndarrays, of torch's CPU tensors) add up to a megabyte or more, they do not stand in it: they lie in a
*segment*, anonymous memory the caller owns, which the message names. The worker maps that segment instead of
reading it, and writes its result's buffers into a second one, which the caller then looks at without copying.

Segments have no name in any file system: the kernel frees one when the last process that maps it is gone,
however it went. They are reused, because touching fresh memory costs more than copying. What lies in one
already is not written again: ten clients of a round that get the same weights share one segment.

Linux only (``memfd_create``, ``/proc``); elsewhere, and below the threshold, buffers travel in the message.
"""

import ctypes
import errno
import functools
import logging
import math
import mmap
import os
import pickle
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedexec.errors import TransferError
from fedexec.machine import available_bytes
from fedexec.pickling import Sources, dump, load_with_main, loads
from fedexec.settings import format_size

__all__ = ["Delivery", "Parcel", "SegmentPool", "UnreachableSegmentError", "supported"]

log = logging.getLogger("fedexec")

_TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
THRESHOLD = 1 << 20  # bytes of buffers from which a segment is worth its system calls
ALIGNMENT = 64  # of each buffer in a segment: a cache line, and what vector instructions like
HUGE_PAGE = 2 << 20  # bytes; segments are a multiple of it
KEPT_RESULTS = 64  # that keep their segment, to be reused; the memory of more goes when they are dropped
IDLE_SECONDS = 2.0  # after which a segment nobody uses is given back to the system


@functools.cache
def supported() -> bool:
    """Return whether this system has what segments need. It is tried once, and said if it is refused."""
    if not hasattr(os, "memfd_create"):
        return False
    try:
        fd = os.memfd_create("fedexec", os.MFD_CLOEXEC)
        try:
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC))
        finally:
            os.close(fd)
    except OSError as exc:
        if exc.errno in _TOO_MANY_FILES:
            return True
        log.warning("this system does not let memory be shared (%s): arrays are copied", exc)
        return False
    return True


class UnreachableSegmentError(Exception):
    """The worker may not open the caller's segment (a hardened ``/proc``): send it in the message."""


# ---------------------------------------------------------------- messages


@dataclass(frozen=True, slots=True)
class _Place:
    """A segment as another process finds it."""

    pid: int
    fd: int

    def open(self, size: int, *, write: bool) -> tuple[mmap.mmap, int]:
        """Map it: for the reader privately, so that writing to an argument copies that page and no other.

        Returns
        -------
        tuple of mmap and int
            The mapping, and where in it the segment begins.
        """
        try:
            fd = os.open(f"/proc/{self.pid}/fd/{self.fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise UnreachableSegmentError(str(exc)) from exc
        try:
            if not write:
                return _map(fd, size, mmap.MAP_PRIVATE)
            _allocate(fd, size)
            return _map(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class _Message:
    """A pickled object, and where its buffers are."""

    data: bytes
    buffers: tuple[bytes, ...] = ()  # those that travel along
    place: _Place | None = None  # of those that do not,
    layout: tuple[tuple[int, int], ...] = ()  # at these (offset, size)
    answer: _Place | None = None  # where the result's buffers may go
    device: str | None = None  # that the worker is to compute on
    stderr: str | None = None  # where it is to write that
    seed: int | None = None  # of the random numbers that it is to draw
    sources: Sources = ()  # of notebook cells, for tracebacks
    learns: bool = False  # whether the caller wants to know what is imported
    path: tuple[str, ...] | None = None  # its sys.path, if that is another than at its start


def _lay_out(buffers: list[memoryview]) -> tuple[tuple[tuple[int, int], ...], int]:
    """Give each buffer its place in a segment; return places and total size."""
    layout, end = [], 0
    for buffer in buffers:
        layout.append((end, buffer.nbytes))
        end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(layout), end


def _copy(
    memory: mmap.mmap, layout: tuple[tuple[int, int], ...], buffers: list[memoryview], start: int = 0
) -> None:
    """Copy buffers to their places, with the GIL released."""
    import numpy as np  # whoever has a buffer has imported it

    target = np.frombuffer(memory, dtype=np.uint8, offset=start)
    for (offset, size), buffer in zip(layout, buffers, strict=True):
        np.copyto(target[offset : offset + size], np.frombuffer(buffer, dtype=np.uint8))


# ---------------------------------------------------------------- memory

if sys.platform != "win32":
    _libc = ctypes.CDLL(None)
    _memcmp = _libc.memcmp  # releases the GIL, as np.copyto does
    _memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _mmap, _munmap, _madvise = _libc.mmap, _libc.munmap, _libc.madvise
    _mmap.restype = ctypes.c_void_p
    _mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    _munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25  # the mmap module does not have them


def _allocate(fd: int, size: int) -> int:
    """Give a segment at least `size` bytes; what was in it may be lost. Return how many it has.

    In huge pages where the kernel can (MADV_COLLAPSE, Linux 6.1): of 100 MB, to fill fresh memory then takes
    13 ms instead of 70, and to map it in another process and look at it 0.3 ms instead of 8. (Memory the
    machine itself has never touched costs more the first time either way.)
    """
    actual = os.fstat(fd).st_size
    if actual >= size:
        return actual
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    os.ftruncate(fd, size)
    # The kernel collapses only where address and offset fit a huge page: map it there for a moment.
    reserved = _mmap(None, size + HUGE_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if reserved == ctypes.c_void_p(-1).value:
        return size
    aligned = -(-reserved // HUGE_PAGE) * HUGE_PAGE
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    if _mmap(aligned, size, writable, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == aligned:
        for page in range(aligned, aligned + size, HUGE_PAGE):
            ctypes.c_char.from_address(page).value = b"\0"  # an empty one is not collapsed
        _madvise(aligned, size, _MADV_COLLAPSE)  # if it refuses, small pages it is
    _munmap(reserved, size + HUGE_PAGE)
    return size


def _map(fd: int, size: int, flags: int) -> tuple[mmap.mmap, int]:
    """Map a segment where its huge pages are entries of the page table as they are; return it and its start.

    The kernel can do that only where address and offset fit a huge page, and the mmap module takes no
    address: it maps room for it, and the segment goes over that. To look at 100 MB takes 50 page faults
    instead of 1,500, and 0.8 ms instead of 5.
    """
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    room = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    start = -address % HUGE_PAGE
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    if _mmap(address + start, size, writable, flags | _MAP_FIXED, fd, 0) != address + start:
        raise OSError(f"cannot map a segment of {format_size(size)}")
    return room, start


# ---------------------------------------------------------------- in the worker


class Delivery:
    """What :meth:`SegmentPool.parcel` packed, as it arrives in the worker.

    Parameters
    ----------
    data : bytes
    """

    def __init__(self, data: bytes) -> None:
        self._message: _Message = pickle.loads(data)
        self._memory: mmap.mmap | None = None

    @property
    def device(self) -> str | None:
        """UUID of the device to compute on, known before anything is unpickled."""
        return self._message.device

    @property
    def stderr(self) -> str | None:
        """Where to write stderr; see :mod:`fedexec.stderr`."""
        return self._message.stderr

    @property
    def seed(self) -> int | None:
        """What its random numbers follow from."""
        return self._message.seed

    @property
    def path(self) -> tuple[str, ...] | None:
        """The caller's ``sys.path``; None where it is what it was when the worker was started."""
        return self._message.path

    @property
    def learns(self) -> bool:
        """Whether the caller wants to know what the task imports."""
        return self._message.learns

    @property
    def sources(self) -> Sources:
        """Lines of notebook cells."""
        return self._message.sources

    def open(self) -> Any:
        """Unpickle the object.

        Arrays are views of the segment: writing to one copies the page written to; the caller never sees it.

        Raises
        ------
        UnreachableSegmentError
            The segment cannot be opened from here.
        """
        message = self._message
        if message.place is None:
            return load_with_main(message.data, map(bytearray, message.buffers))
        end = max(offset + size for offset, size in message.layout)
        self._memory, start = message.place.open(end, write=False)
        with memoryview(self._memory) as memory:
            views = [memory[start + offset : start + offset + size] for offset, size in message.layout]
        return load_with_main(message.data, views)

    def answer(self, obj: Any) -> bytes:
        """Pack a result for :meth:`Parcel.open`.

        Raises
        ------
        TransferError
            There is not enough memory for its buffers.
        """
        data, buffers, _ = dump(obj)
        layout, size = _lay_out(buffers)
        place = self._message.answer
        if size >= THRESHOLD:
            _check_room(size)
        if place is None or size < THRESHOLD:
            return pickle.dumps(_Message(data, tuple(map(bytes, buffers))))
        memory, start = place.open(size, write=True)
        _copy(memory, layout, buffers, start)
        memory.close()
        return pickle.dumps(_Message(data, place=place, layout=layout))

    def close(self) -> bool:
        """Unmap the segment. False if somebody still looks at it, so that it must not be written to again."""
        try:
            if self._memory is not None:
                self._memory.close()
        except BufferError:
            return False
        return True


def _check_room(size: int) -> None:
    available = available_bytes()
    if size > available:
        raise TransferError(
            f"{format_size(size)} of arrays do not fit into memory: {format_size(available)} are free"
        )


# ---------------------------------------------------------------- in the caller's process


class _Segment:
    """Anonymous memory that other processes can map through ``/proc``."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("fedexec", os.MFD_CLOEXEC)
        self.size = 0
        self.users = 0
        self.free_since = 0.0
        self.layout: tuple[tuple[int, int], ...] = ()  # of the buffers that lie in it, if it may be shared
        self.owners: list[weakref.ref[Any]] = []  # of the objects they were read from,
        self.read_at = 0.0  # and when that began
        self.kept = False  # a worker still looks at it: never to be written to again
        self.viewed = False  # the caller looks at it as a result
        self.memory: mmap.mmap | None = None
        self.start = 0  # where in the mapping it begins

    @property
    def place(self) -> _Place:
        return _Place(os.getpid(), self.fd)

    def fit(self, size: int) -> mmap.mmap:
        """Map at least `size` bytes. Only while nobody uses it."""
        if self.memory is None or self.size < size:
            actual = _allocate(self.fd, size)
            # Not by the mmap module, which would hold a second descriptor as long as any view lives.
            self.memory, self.start = _map(self.fd, actual, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self.size = actual
        return self.memory

    def holds(self, layout: tuple[tuple[int, int], ...], buffers: list[memoryview], since: float) -> bool:
        """Return whether exactly these bytes lie in it.

        They do if they were read from these very objects after `since`, or if these cannot change, which
        spares seven of the eight comparisons when eight tasks are given the same arrays at once. Else the
        first difference decides.
        """
        if layout != self.layout or self.memory is None:
            return False
        if all(
            owner() is buffer.obj and (self.read_at >= since or _is_constant(buffer.obj))
            for owner, buffer in zip(self.owners, buffers, strict=True)
        ):
            return True
        import numpy as np

        begun = time.monotonic()
        mine = np.frombuffer(self.memory, dtype=np.uint8).ctypes.data + self.start
        if any(
            _memcmp(mine + offset, np.frombuffer(buffer, dtype=np.uint8).ctypes.data, size)
            for (offset, size), buffer in zip(layout, buffers, strict=True)
        ):
            return False
        self.remember(layout, buffers, begun)
        return True

    def write(self, layout: tuple[tuple[int, int], ...], size: int, buffers: list[memoryview]) -> None:
        """Copy buffers into it."""
        begun = time.monotonic()
        memory = self.fit(size)
        _copy(memory, layout, buffers, self.start)
        self.remember(layout, buffers, begun)

    def remember(
        self, layout: tuple[tuple[int, int], ...], buffers: list[memoryview], read_at: float
    ) -> None:
        """Note what lies in it. An owner that is gone is no other's equal, whatever address that one gets."""
        self.layout, self.read_at = layout, read_at
        try:
            self.owners = [weakref.ref(buffer.obj) for buffer in buffers]
        except TypeError:  # of a kind that knows no weak references
            self.read_at = 0.0

    def forget(self) -> None:
        """Note that it is about to hold something else."""
        self.layout, self.owners, self.read_at = (), [], 0.0

    def close(self) -> None:
        os.close(self.fd)
        self.memory = None  # unmapped when the last view of it is gone


def _is_constant(owner: Any) -> bool:
    """Return whether an array looks at ``bytes``, which nobody writes to."""
    while isinstance(owner, memoryview) or hasattr(owner, "base"):
        owner = owner.obj if isinstance(owner, memoryview) else owner.base
    return isinstance(owner, bytes)


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
        self._segments: list[_Segment] = []
        self._returned: deque[_Segment] = deque()  # appended by finalizers, which must not take a lock
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
        layout, size = _lay_out(buffers)
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
                _check_room(size)
            message = _Message(data, tuple(map(bytes, buffers)), **where)
            return Parcel(pickle.dumps(message), self, None, None)
        back, there = None, None
        try:
            back = self._take(size)
            there = self._place(layout, size, buffers, since) if size >= THRESHOLD else None
        except OSError as exc:
            if exc.errno not in _TOO_MANY_FILES:
                raise
            if back is not None:
                self.release(back)
            back = None  # Without descriptors everything travels in the message.
        if back is None or there is None:
            inside = tuple(map(bytes, buffers))
            message = _Message(data, inside, answer=None if back is None else back.place, **where)
            return Parcel(pickle.dumps(message), self, None, back)
        message = _Message(data, place=there.place, layout=layout, answer=back.place, **where)
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

    def release(self, segment: _Segment) -> None:
        """Note that one user less needs a segment; from any thread, and from finalizers."""
        self._returned.append(segment)

    def view(self, segment: _Segment, size: int) -> memoryview:
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
    ) -> _Segment:
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

    def _take(self, size: int) -> _Segment:
        """Return a segment for a result, rather one that has `size` bytes already."""
        with self._lock:
            self._collect()
            segment = self._free_segment(size, reserve=False)
            segment.forget()
            return segment

    def _free_segment(self, size: int, *, reserve: bool = True) -> _Segment:
        free = [segment for segment in self._segments if not segment.users]
        if not reserve:  # a result goes rather where nothing lies that may be sent again
            free = [segment for segment in free if not segment.layout] or free
        enough = [segment for segment in free if segment.size >= size]
        if enough:
            segment = min(enough, key=lambda segment: segment.size)
        else:
            if reserve:
                _check_room(size)
            segment = max(free, key=lambda segment: segment.size) if free else self._new_segment()
        segment.users += 1
        return segment

    def _new_segment(self) -> _Segment:
        segment = _Segment()
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
        self, message: bytes, pool: SegmentPool, there: _Segment | None, back: _Segment | None
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
        message: _Message = pickle.loads(data)
        if message.place is None:
            return loads(message.data, map(bytearray, message.buffers))
        assert self._back is not None
        end = max(offset + size for offset, size in message.layout)
        memory = self._pool.view(self._back, end)
        self._back = None  # the views hold it now
        return loads(message.data, [memory[offset : offset + size] for offset, size in message.layout])
