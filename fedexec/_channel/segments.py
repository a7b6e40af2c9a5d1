"""Segments: anonymous memory of the caller that its workers map too, so that large arrays are not copied.

A segment has no name in any file system: the kernel frees it when the last process that maps it is gone,
however that process ended. Another process opens it through ``/proc`` (Linux only, ``memfd_create``).
"""

import ctypes
import errno
import functools
import logging
import mmap
import os
import sys
import time
import weakref
from dataclasses import dataclass
from typing import Any

from fedexec._system.machine import available_bytes
from fedexec._system.sizes import format_size
from fedexec.errors import TransferError

__all__ = [
    "TOO_MANY_FILES",
    "Place",
    "Segment",
    "UnreachableSegmentError",
    "check_room",
    "copy_buffers",
    "lay_out",
    "supported",
]

log = logging.getLogger("fedexec")
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
ALIGNMENT = 64  # of each buffer in a segment: a cache line, and what vector instructions like
HUGE_PAGE = 2 << 20  # bytes; segments are a multiple of it


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
        if exc.errno in TOO_MANY_FILES:
            return True
        log.warning("this system does not let memory be shared (%s): arrays are copied", exc)
        return False
    return True


class UnreachableSegmentError(Exception):
    """The worker may not open the caller's segment (a hardened ``/proc``): send it in the message."""


@dataclass(frozen=True, slots=True)
class Place:
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
                return map_segment(fd, size, mmap.MAP_PRIVATE)
            allocate(fd, size)
            return map_segment(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        finally:
            os.close(fd)


class Segment:
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
    def place(self) -> Place:
        return Place(os.getpid(), self.fd)

    def fit(self, size: int) -> mmap.mmap:
        """Map at least `size` bytes. Only while nobody uses it."""
        if self.memory is None or self.size < size:
            actual = allocate(self.fd, size)
            # Not by the mmap module, which would hold a second descriptor as long as any view lives.
            self.memory, self.start = map_segment(self.fd, actual, mmap.MAP_SHARED | mmap.MAP_POPULATE)
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
        copy_buffers(memory, layout, buffers, self.start)
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


def lay_out(buffers: list[memoryview]) -> tuple[tuple[tuple[int, int], ...], int]:
    """Give each buffer its place in a segment; return places and total size."""
    layout, end = [], 0
    for buffer in buffers:
        layout.append((end, buffer.nbytes))
        end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(layout), end


def copy_buffers(
    memory: mmap.mmap, layout: tuple[tuple[int, int], ...], buffers: list[memoryview], start: int = 0
) -> None:
    """Copy buffers to their places, with the GIL released."""
    import numpy as np  # whoever has a buffer has imported it

    target = np.frombuffer(memory, dtype=np.uint8, offset=start)
    for (offset, size), buffer in zip(layout, buffers, strict=True):
        np.copyto(target[offset : offset + size], np.frombuffer(buffer, dtype=np.uint8))


def check_room(size: int) -> None:
    available = available_bytes()
    if size > available:
        raise TransferError(
            f"{format_size(size)} of arrays do not fit into memory: {format_size(available)} are free"
        )


# ---------------------------------------------------------------- memory in huge pages

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


def allocate(fd: int, size: int) -> int:
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


def map_segment(fd: int, size: int, flags: int) -> tuple[mmap.mmap, int]:
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
