"""Computes what PyTorch's caching allocator would reserve (``c10/cuda/CUDACachingAllocator.cpp``)."""

import bisect
import os
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Block", "CachingAllocator", "FullError"]

MIB = 1 << 20
ROUNDING = 512  # bytes; the size of every block is a multiple
SMALL = MIB  # blocks up to this size come from the small pool,
SMALL_SEGMENT = 2 * MIB  # whose segments have this size
MEDIUM = 10 * MIB  # larger blocks up to this size
LARGE_SEGMENT = 20 * MIB  # come from segments of this size
LARGE_ROUNDING = 2 * MIB  # still larger blocks have segments of their own, rounded up to this size


class FullError(Exception):
    """The device has too little free memory."""


@dataclass(eq=False)
class Block:
    """A block of emulated memory. It is freed by :meth:`free`, by leaving its context, or when collected."""

    on_free: "Callable[[Block], None]"
    segment: "_Segment"
    offset: int
    size: int
    pid: int = field(default_factory=os.getpid)
    is_free: bool = False

    def free(self) -> None:
        """Give the block back to the cache of its process."""
        if not self.is_free:
            self.is_free = True
            self.on_free(self)

    def __enter__(self) -> "Block":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.free()

    def __del__(self) -> None:
        self.free()


@dataclass(eq=False)
class _Segment:
    """Memory that the allocator has taken from the device at once, and which parts of it are free."""

    size: int
    is_small: bool
    gaps: list[tuple[int, int]] = field(default_factory=list)  # free (offset, size), sorted, never adjacent


class CachingAllocator:
    """The blocks and the cache of one process on one device.

    Parameters
    ----------
    reserve : callable
        ``reserve(held, needed)`` has this process hold `needed` bytes of the device instead of `held`, or
        raises FullError.
    context : int
        Bytes of the context, which the process holds from its first block on.

    Attributes
    ----------
    held, allocated, peak : int
        Bytes of context and segments, bytes of blocks, and the most bytes that were held.
    """

    def __init__(self, reserve: Callable[[int, int], None], context: int) -> None:
        self._reserve = reserve
        self.context = context
        self._segments: list[_Segment] = []
        self.held = 0  # context and segments
        self.allocated = 0
        self.peak = 0

    def allocate(self, nbytes: int, on_free: Callable[[Block], None]) -> Block:
        """Allocate a block.

        Parameters
        ----------
        nbytes : int
        on_free : callable
            ``on_free(block)`` is called when the block is freed.

        Returns
        -------
        Block

        Raises
        ------
        FullError
            Neither the cache nor the device has enough free memory.
        """
        if not self.held:
            self._hold(self.context)
        size = max(ROUNDING, -(-nbytes // ROUNDING) * ROUNDING)
        segment, offset, room = self._best_fit(size) or self._grow(size)
        # Keep the rest of a gap for other blocks; but torch splits a large gap only if over 1 MiB is left.
        rest = room - size
        if rest < ROUNDING or (not segment.is_small and rest <= SMALL):
            size = room
        segment.gaps.remove((offset, room))
        if size < room:
            bisect.insort(segment.gaps, (offset + size, room - size))
        self.allocated += size
        return Block(on_free, segment, offset, size)

    def free(self, block: Block) -> None:
        """Give the memory of a block back to the cache.

        Parameters
        ----------
        block : Block
        """
        self.allocated -= block.size
        gaps = block.segment.gaps
        at = bisect.bisect(gaps, (block.offset, block.size))
        start, end = block.offset, block.offset + block.size
        if at < len(gaps) and gaps[at][0] == end:
            end += gaps.pop(at)[1]
        if at and sum(gaps[at - 1]) == start:
            start = gaps.pop(at - 1)[0]
        bisect.insort(gaps, (start, end - start))

    def release_cached(self) -> None:
        """Give back to the device the segments in which no block is allocated."""
        whole = [segment for segment in self._segments if segment.gaps == [(0, segment.size)]]
        if whole:
            self._segments = [segment for segment in self._segments if segment not in whole]
            self._hold(self.held - sum(segment.size for segment in whole))

    def _best_fit(self, size: int) -> tuple[_Segment, int, int] | None:
        fits = [
            (room, number, offset)
            for number, segment in enumerate(self._segments)
            if segment.is_small == (size <= SMALL)
            for offset, room in segment.gaps
            if room >= size
        ]
        if not fits:
            return None
        room, number, offset = min(fits)
        return self._segments[number], offset, room

    def _grow(self, size: int) -> tuple[_Segment, int, int]:
        if size <= SMALL:
            segment = _Segment(SMALL_SEGMENT, is_small=True)
        elif size < MEDIUM:
            segment = _Segment(LARGE_SEGMENT, is_small=False)
        else:
            segment = _Segment(-(-size // LARGE_ROUNDING) * LARGE_ROUNDING, is_small=False)
        try:
            self._hold(self.held + segment.size)
        except FullError:
            self.release_cached()
            self._hold(self.held + segment.size)
        segment.gaps.append((0, segment.size))
        self._segments.append(segment)
        return segment, 0, segment.size

    def _hold(self, needed: int) -> None:
        self._reserve(self.held, needed)
        self.held = needed
        self.peak = max(self.peak, needed)
