"""Segments: anonymous memory of the caller that its workers map too, so that large arrays are not copied.

A segment has no name in any file system. So the kernel frees it when the last process that maps it has ended,
however that process ended. Another process opens a segment through ``/proc`` (Linux only: ``memfd_create``).
"""

import ctypes
import errno
import functools
import logging
import mmap
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from fedexec._channel.held_buffers import Held, copy_buffers
from fedexec._system.available_resources import available_bytes
from fedexec._system.sizes import format_size
from fedexec.errors import TransferError

__all__ = [
    "TOO_MANY_FILES",
    "Place",
    "Segment",
    "UnreachableSegmentError",
    "check_room",
    "supported",
]

log = logging.getLogger("fedexec")
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
HUGE_PAGE = 2 << 20  # bytes; the size of a segment is a multiple of it


@functools.cache
def supported() -> bool:
    """Return whether this system supports segments. This is tried once; a warning says if it is refused."""
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
        log.warning("this system does not let processes share memory (%s), so arrays are copied", exc)
        return False
    return True


class UnreachableSegmentError(Exception):
    """The worker cannot open the caller's segment (a hardened ``/proc``): send the buffers in the message."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where another process finds a segment: as descriptor `fd` of process `pid`."""

    pid: int
    fd: int

    def open(self, size: int, *, write: bool) -> tuple[mmap.mmap, int]:
        """Map the segment in this process.

        Parameters
        ----------
        size : int
            Bytes to map.
        write : bool
            Whether to share what this process writes. If not, the mapping is private: writing to an argument
            copies the page that is written to, and no other.

        Returns
        -------
        memory : mmap
        start : int
            Offset in bytes at which the segment begins in `memory`.

        Raises
        ------
        UnreachableSegmentError
            This process may not open the segment.
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


class Segment(Held):
    """Anonymous memory that other processes can map through ``/proc``.

    Attributes
    ----------
    fd : int
    size : int
        Bytes that are mapped in this process.
    users : int
        How many parcels and views use the segment.
    free_since : float
        Time of :func:`time.monotonic` at which the last user has released the segment.
    kept : bool
        Whether a worker still has views of the segment, so that it must not be written to again.
    viewed : bool
        Whether the caller has views of the segment, as a result.
    memory, start : mmap or None, and int
        The mapping, and the offset in bytes at which the segment begins in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.memfd_create("fedexec", os.MFD_CLOEXEC)
        self.size = 0
        self.users = 0
        self.free_since = 0.0
        self.kept = False
        self.viewed = False
        self.memory: mmap.mmap | None = None
        self.start = 0

    @property
    def place(self) -> Place:
        return Place(os.getpid(), self.fd)

    def fit(self, size: int) -> mmap.mmap:
        """Map the segment in this process. Only while the segment has no user.

        Parameters
        ----------
        size : int
            Bytes to map at least.

        Returns
        -------
        mmap
        """
        if self.memory is None or self.size < size:
            actual = allocate(self.fd, size)
            # Not with mmap.mmap(fd), which would keep a second descriptor open as long as any view exists.
            self.memory, self.start = map_segment(self.fd, actual, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            self.size = actual
        return self.memory

    def write(self, layout: tuple[tuple[int, int], ...], size: int, buffers: Sequence[memoryview]) -> None:
        """Copy buffers into the segment, and remember what it holds.

        Parameters
        ----------
        layout : tuple of (int, int)
            (offset, size) of each buffer in bytes.
        size : int
            Bytes that the buffers need in all.
        buffers : sequence of memoryview
        """
        begun = time.monotonic()
        memory = self.fit(size)
        copy_buffers(memory, layout, buffers, self.start)
        self.remember(layout, buffers, begun)

    def close(self) -> None:
        """Close the descriptor. The memory is unmapped when its last view is gone."""
        os.close(self.fd)
        self.memory = None


def check_room(size: int) -> None:
    """Raise an error if there is too little memory.

    Parameters
    ----------
    size : int
        Bytes that are needed.

    Raises
    ------
    TransferError
        Less memory is available.
    """
    available = available_bytes()
    if size > available:
        raise TransferError(
            f"{format_size(size)} of arrays do not fit into memory: {format_size(available)} are free"
        )


# ---------------------------------------------------------------- memory in huge pages

if sys.platform != "win32":
    _libc = ctypes.CDLL(None)
    _mmap, _munmap, _madvise = _libc.mmap, _libc.munmap, _libc.madvise
    _mmap.restype = ctypes.c_void_p
    _mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    _munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_MAP_FIXED, _MADV_COLLAPSE = 0x10, 25  # the mmap module does not define these


def allocate(fd: int, size: int) -> int:
    """Give a segment at least `size` bytes, in huge pages where the kernel can; its content may be lost.

    With huge pages (MADV_COLLAPSE, Linux 6.1), filling 100 MB of fresh memory takes 13 ms instead of 70, and
    mapping and reading them in another process takes 0.3 ms instead of 8. (Memory that the machine itself has
    never used before costs more the first time in both cases.)

    Parameters
    ----------
    fd : int
        Descriptor of the segment.
    size : int
        Bytes.

    Returns
    -------
    int
        Bytes that the segment has now.
    """
    actual = os.fstat(fd).st_size
    if actual >= size:
        return actual
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    os.ftruncate(fd, size)
    # The kernel collapses pages only where address and offset fit a huge page, so map the segment there now.
    reserved = _mmap(None, size + HUGE_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if reserved == ctypes.c_void_p(-1).value:
        return size
    aligned = -(-reserved // HUGE_PAGE) * HUGE_PAGE
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    if _mmap(aligned, size, writable, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) == aligned:
        for page in range(aligned, aligned + size, HUGE_PAGE):
            ctypes.c_char.from_address(page).value = b"\0"  # the kernel does not collapse an empty page
        _madvise(aligned, size, _MADV_COLLAPSE)  # if the kernel refuses, the segment has small pages
    _munmap(reserved, size + HUGE_PAGE)
    return size


def map_segment(fd: int, size: int, flags: int) -> tuple[mmap.mmap, int]:
    """Map a segment so that each of its huge pages is one entry of the page table.

    The kernel can do that only if address and offset fit a huge page. The mmap module does not let the caller
    choose the address, so it maps a larger room first, and the segment is mapped over that room. Then reading
    100 MB takes 50 page faults instead of 1,500, and 0.8 ms instead of 5.

    Parameters
    ----------
    fd : int
        Descriptor of the segment.
    size : int
        Bytes to map.
    flags : int
        Flags of ``mmap(2)``.

    Returns
    -------
    memory : mmap
    start : int
        Offset in bytes at which the segment begins in `memory`.
    """
    size = -(-size // HUGE_PAGE) * HUGE_PAGE
    room = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    start = -address % HUGE_PAGE
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    if _mmap(address + start, size, writable, flags | _MAP_FIXED, fd, 0) != address + start:
        raise OSError(f"cannot map a segment of {format_size(size)}")
    return room, start
