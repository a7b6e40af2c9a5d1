"""Buffers that are held in one block of memory, so that tasks which get the same arrays share one copy."""

import ctypes
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Held", "copy_buffers", "lay_out"]

ALIGNMENT = 64  # bytes, of each buffer in a block: a cache line, and what vector instructions prefer

if sys.platform != "win32":  # where no backend shares buffers
    _memcmp = ctypes.CDLL(None).memcmp  # ctypes releases the GIL for it, as np.copyto does
    _memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class Held:
    """What a block of memory holds.

    Attributes
    ----------
    layout : tuple of (int, int)
        (offset, size) of each buffer that the block holds; empty if the block must not be shared.
    owners : list of weak references
        The objects from which the buffers were read. The reference to an object of a type that does not
        support weak references is empty, so its bytes are always compared.
    read_at : float
        Time of :func:`time.monotonic` at which reading the buffers began.
    """

    def __init__(self) -> None:
        self.layout: tuple[tuple[int, int], ...] = ()
        self.owners: list[Callable[[], object]] = []
        self.read_at = 0.0

    def holds(
        self,
        memory: Any,
        start: int,
        layout: tuple[tuple[int, int], ...],
        buffers: Sequence[memoryview],
        since: float,
    ) -> bool:
        """Return whether the block holds exactly the bytes of these buffers.

        It does if the bytes were read from the same objects after `since`, or if these objects cannot
        change. This saves seven of eight comparisons when eight tasks get the same arrays at once. Otherwise
        the bytes are compared up to the first difference.

        Parameters
        ----------
        memory : buffer
        start : int
            Offset in bytes at which the block begins in `memory`.
        layout : tuple of (int, int)
            (offset, size) of each buffer.
        buffers : sequence of memoryview
        since : float
            Time of :func:`time.monotonic` from which nobody writes to the buffers.
        """
        if layout != self.layout:
            return False
        if all(
            owner() is buffer.obj and (self.read_at >= since or _is_constant(buffer.obj))
            for owner, buffer in zip(self.owners, buffers, strict=True)
        ):
            return True
        import numpy as np

        begun = time.monotonic()
        own_address = np.frombuffer(memory, dtype=np.uint8).ctypes.data + start
        if any(
            _memcmp(own_address + offset, np.frombuffer(buffer, dtype=np.uint8).ctypes.data, size)
            for (offset, size), buffer in zip(layout, buffers, strict=True)
        ):
            return False
        self.remember(layout, buffers, begun)
        return True

    def remember(
        self, layout: tuple[tuple[int, int], ...], buffers: Sequence[memoryview], read_at: float
    ) -> None:
        """Note what the block holds. A weak reference to an owner equals no later object at its address."""
        self.layout, self.read_at = layout, read_at
        self.owners = [_reference(buffer.obj) for buffer in buffers]

    def forget(self) -> None:
        """Note that the block no longer holds what it held."""
        self.layout, self.owners, self.read_at = (), [], 0.0


def _reference(owner: object) -> Callable[[], object]:
    try:
        return weakref.ref(owner)
    except TypeError:
        return lambda: None


def _is_constant(owner: Any) -> bool:
    """Return whether the memory of an array belongs to a ``bytes`` object, which never changes."""
    while isinstance(owner, memoryview) or hasattr(owner, "base"):
        owner = owner.obj if isinstance(owner, memoryview) else owner.base
    return isinstance(owner, bytes)


def lay_out(buffers: Sequence[memoryview]) -> tuple[tuple[tuple[int, int], ...], int]:
    """Lay out buffers in a block of memory.

    Parameters
    ----------
    buffers : sequence of memoryview

    Returns
    -------
    layout : tuple of (int, int)
        (offset, size) of each buffer in bytes.
    size : int
        Bytes of the block that the buffers need.
    """
    layout, end = [], 0
    for buffer in buffers:
        layout.append((end, buffer.nbytes))
        end += -(-buffer.nbytes // ALIGNMENT) * ALIGNMENT
    return tuple(layout), end


def copy_buffers(
    memory: Any, layout: tuple[tuple[int, int], ...], buffers: Sequence[memoryview], start: int = 0
) -> None:
    """Copy buffers into a block of memory; numpy releases the GIL meanwhile.

    Parameters
    ----------
    memory : buffer
        Writable.
    layout : tuple of (int, int)
        (offset, size) of each buffer in bytes.
    buffers : sequence of memoryview
    start : int
        Offset in bytes at which the block begins in `memory`.
    """
    import numpy as np  # a program that has a buffer has imported numpy

    target = np.frombuffer(memory, dtype=np.uint8, offset=start)
    for (offset, size), buffer in zip(layout, buffers, strict=True):
        np.copyto(target[offset : offset + size], np.frombuffer(buffer, dtype=np.uint8))
