"""An EMULATED accelerator: a capacity that real processes fill, for machines that have none.

``FEDEXEC_DEVICE=emulated:24GiB`` makes one; ``emulated:2x24GiB`` two; ``emulated:24GiB,context=450MiB`` says
what a process takes before its first byte. It emulates what matters to isolation:

- A process that allocates holds a context, and what PyTorch's caching allocator would have reserved for it
  (the rules of ``c10/cuda/CUDACachingAllocator.cpp``). Both come back only when the process has *ended*,
  however it ended; a forked child keeps what its parent held, as on a real GPU.
- All processes of one program share the capacity. Beyond it an allocation fails as in torch.

It computes nothing and takes no real memory. No figure it gives is a real device's, and every one says so.

The ledger is a file without a name (``memfd``) that holds no data, only *locks*: a process that holds `n`
bytes has locked `n` bytes of a range that its pid decides. So the kernel keeps the books: a lock ends with
the last descriptor of the process that took it, whatever killed it. The first process that asks for the
device makes the ledger and tells its children where it is in ``FEDEXEC_EMULATED_LEDGER``. Linux only.
"""

import bisect
import contextlib
import fcntl
import logging
import os
import re
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedexec.errors import DeviceError, SettingsError
from fedexec.memory.device import LEDGER_VARIABLE, Device, assigned, is_emulated
from fedexec.settings import format_size, parse_size

__all__ = ["Block", "DeviceMemoryError", "EmulatedDevice", "device", "devices"]

log = logging.getLogger("fedexec")

LEDGER_NAME = "fedexec-emulated"
DEFAULT_CAPACITY = "24GiB"
DEFAULT_CONTEXT = "450MiB"  # published for CUDA 11.7 and later, with lazy loading: 300 to 721 MiB

_SPEC = re.compile(r"emulated(?::(?:(\d+)x)?([^,]+)(?:,context=([^,]+))?)?")


class DeviceMemoryError(RuntimeError):
    """The emulated device is full. Where torch is loaded, its own ``OutOfMemoryError`` is raised instead."""


class EmulatedDevice(Device):
    """One emulated device.

    Parameters
    ----------
    index : int
    capacity, context : int
        Bytes of the device, and of a process's context on it.
    ledger : str
        Path of its ledger.
    """

    def __init__(self, index: int, capacity: int, context: int, ledger: str) -> None:
        self.uuid = f"EMULATED-{index}"
        self.name = f"EMULATED GPU {index}, {format_size(capacity)}, context {format_size(context)}"
        self.capacity = capacity
        self._ledger = _Ledger(ledger)
        self._allocator = _Allocator(self._reserve, context)
        self._freed: deque[Block] = deque()
        self._lock = threading.Lock()
        self._warned = False

    def total_bytes(self) -> int:
        """Return the capacity."""
        return self.capacity

    def used_bytes(self) -> int | None:
        """Return what all processes hold together; None when the ledger is gone."""
        held = self.process_bytes()
        return None if held is None else sum(held.values())

    def process_bytes(self) -> Mapping[int, int] | None:
        """Return pid to bytes; None when the ledger is gone, with the process that made it."""
        try:
            return self._ledger.read()
        except DeviceError as exc:
            if not self._warned:
                log.warning("%s: figures of it are unknown: %s", self.name, exc)
            self._warned = True
            return None

    # ------------------------------------------------------------ for the process that computes

    def allocate(self, nbytes: int) -> "Block":
        """Take memory for this process.

        Returns
        -------
        Block
            Goes back to the process's cache, not to the device, when it is freed.

        Raises
        ------
        torch.OutOfMemoryError, or DeviceMemoryError where torch is not loaded
            It does not fit, cached blocks that could be given back included.
        """
        if nbytes < 0:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        with self._own() as allocator:
            try:
                return allocator.allocate(nbytes, self)
            except _FullError:
                raise self._out_of_memory(nbytes) from None

    def free(self, block: "Block") -> None:
        """Give a block back to this process's cache."""
        self._freed.append(block)  # by a finalizer, perhaps, which must not take the lock

    def empty_cache(self) -> None:
        """Give back what the cache holds in whole segments; the context stays."""
        with self._own() as allocator:
            allocator.release_cached()

    def allocated_bytes(self) -> int:
        """Return what this process's blocks take."""
        with self._own() as allocator:
            return allocator.allocated

    def held_bytes(self) -> int:
        """Return what this process holds: its context, its blocks, its cache."""
        with self._own() as allocator:
            return allocator.held

    @property
    def context_bytes(self) -> int:
        """Return what a process holds before its first block."""
        return self._allocator.context

    def peak_bytes(self) -> int:
        """Return the most it has held since :meth:`reset_peak`."""
        with self._own() as allocator:
            return allocator.peak

    def reset_peak(self) -> None:
        """Have the peak begin anew."""
        with self._own() as allocator:
            allocator.peak = allocator.held

    @contextlib.contextmanager
    def _own(self) -> Iterator["_Allocator"]:
        """Lend the books of this process, up to date; one that was forked begins with nothing.

        What its parent held stays locked as long as the descriptor it inherited is open.
        """
        with self._lock:
            if self._ledger.disown():
                self._allocator = _Allocator(self._reserve, self._allocator.context)
            while self._freed:
                block = self._freed.popleft()
                if block.pid == os.getpid():
                    self._allocator.free(block)
            yield self._allocator

    def _reserve(self, held: int, wanted: int) -> None:
        """Hold `wanted` bytes instead of `held`; _FullError if they are not there."""
        with self._ledger.exclusive():
            if wanted > held and self._ledger.used() - held + wanted > self.capacity:
                raise _FullError
            self._ledger.write(held, wanted)

    def _out_of_memory(self, nbytes: int) -> Exception:
        used, mine = self._ledger.used(), self._allocator.held
        message = (
            f"CUDA out of memory. Tried to allocate {format_size(nbytes)}. {self.name} has "
            f"{format_size(self.capacity - used)} free. This process holds {format_size(mine)}, its "
            f"blocks take {format_size(self._allocator.allocated)} of it."
        )
        torch = sys.modules.get("torch")
        error: type[Exception] = getattr(torch, "OutOfMemoryError", DeviceMemoryError)
        return error(message)


def devices(spec: str) -> tuple[EmulatedDevice, ...]:
    """Make, or find, the emulated devices of this program.

    Parameters
    ----------
    spec : str
        ``emulated[:[N x]SIZE[,context=SIZE]]``, without spaces.

    Raises
    ------
    SettingsError
        That is not a device.
    DeviceError
        The ledger that this process inherited cannot be opened.
    """
    if spec not in _made:
        count, capacity, context = _parse(spec)
        _made[spec] = tuple(
            EmulatedDevice(index, capacity, context, path) for index, path in enumerate(_ledgers(count))
        )
    return _made[spec]


def device() -> EmulatedDevice:
    """Return the emulated device this process computes on: the one it was assigned, else the first.

    Raises
    ------
    DeviceError
        ``FEDEXEC_DEVICE`` does not name one.
    """
    spec = os.environ.get("FEDEXEC_DEVICE", "")
    if not is_emulated(spec):
        raise DeviceError(f"FEDEXEC_DEVICE={spec!r} is no emulated device. Write it like emulated:24GiB")
    all_ = devices(spec)
    return next((each for each in all_ if each.uuid == assigned()), all_[0])


_made: dict[str, tuple[EmulatedDevice, ...]] = {}


def _renew_locks() -> None:
    """Free a forked process of locks whose holders, other threads, have stayed with its parent."""
    for found in _made.values():
        for each in found:
            each._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def _parse(spec: str) -> tuple[int, int, int]:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise SettingsError(f"{spec!r} is no emulated device. Write it like emulated:24GiB,context=450MiB")
    count, capacity, context = int(match[1] or 1), parse_size(match[2] or DEFAULT_CAPACITY), match[3]
    context_bytes = parse_size(context or DEFAULT_CONTEXT)
    if count < 1 or context_bytes >= capacity or capacity >= _Ledger.SPAN:
        raise SettingsError(f"{spec!r}: at least one device, larger than its context, smaller than 1 TiB")
    return count, capacity, context_bytes


def _ledgers(count: int) -> list[str]:
    known = os.environ.get(LEDGER_VARIABLE, "").split(":")
    if known != [""] and len(known) == count:
        if all(_is_ledger(path) for path in known):
            return known
        raise DeviceError(
            f"the emulated device of this program is gone: the process that made it has ended. "
            f"Unset {LEDGER_VARIABLE} ({':'.join(known)}) to have a new one"
        )
    try:
        fds = [os.memfd_create(LEDGER_NAME) for _ in range(count)]
    except (AttributeError, OSError) as exc:
        raise DeviceError(f"this system cannot emulate a device: {exc}") from exc
    paths = [f"/proc/{os.getpid()}/fd/{fd}" for fd in fds]
    os.environ[LEDGER_VARIABLE] = ":".join(paths)
    return paths


def _is_ledger(path: str) -> bool:
    """Tell a ledger from what another process of the same pid has there by now."""
    try:
        return str(Path(path).readlink()).startswith(f"/memfd:{LEDGER_NAME} ")
    except OSError:
        return False


# ---------------------------------------------------------------- the ledger


class _Ledger:
    """Who holds how much, as locks of a file (``F_OFD_SETLK`` in fcntl(2))."""

    SPAN = 1 << 40  # bytes of the file that a pid may lock, from pid * SPAN on
    END = 1 << 62  # beyond every pid (they are less than 2**22); this byte is the lock for changes

    def __init__(self, path: str) -> None:
        self._path = path
        self._pid = os.getpid()
        self._fd: int | None = None  # its locks are ours

    def disown(self) -> bool:
        """Return whether this is a forked process: it gets a descriptor, and so locks, of its own."""
        if self._pid == os.getpid():
            return False
        self._pid, self._fd = os.getpid(), None  # the inherited descriptor stays open, on purpose
        return True

    def read(self) -> dict[int, int]:
        """Return pid to bytes."""
        held: dict[int, int] = {}
        fd = self._open()  # another description than the one with our locks: those are seen, too
        try:
            spans = [(0, self.END)]
            while spans:
                start, end = spans.pop()
                found = self._find(fd, start, end)
                if found is None:
                    continue
                first, last = found
                pid = first // self.SPAN
                held[pid] = held.get(pid, 0) + last - first
                # The kernel gives any lock in the span, not the first: look on both sides of it.
                spans += [span for span in ((start, first), (last, end)) if span[0] < span[1]]
        finally:
            os.close(fd)
        return held

    def used(self) -> int:
        """Return what all hold together."""
        return sum(self.read().values())

    def write(self, held: int, wanted: int) -> None:
        """Hold `wanted` bytes instead of `held`."""
        start = os.getpid() * self.SPAN
        if wanted > held:
            self._lock(fcntl.F_WRLCK, start + held, wanted - held)
        elif wanted < held:
            self._lock(fcntl.F_UNLCK, start + wanted, held - wanted)

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep every other process from changing the ledger."""
        self._lock(fcntl.F_WRLCK, self.END, 1, wait=True)
        try:
            yield
        finally:
            self._lock(fcntl.F_UNLCK, self.END, 1)

    def _lock(self, kind: int, start: int, size: int, *, wait: bool = False) -> None:
        if self._fd is None:
            self._fd = self._open()
        command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
        fcntl.fcntl(self._fd, command, struct.pack("hhqqi4x", kind, os.SEEK_SET, start, size, 0))

    @staticmethod
    def _find(fd: int, start: int, end: int) -> tuple[int, int] | None:
        question = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
        kind, _, first, size, _ = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_OFD_GETLK, question))
        return None if kind == fcntl.F_UNLCK else (max(first, start), min(first + size, end))

    def _open(self) -> int:
        if not _is_ledger(self._path):
            raise DeviceError(f"the ledger of the emulated device, {self._path}, is gone with who made it")
        try:
            return os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as exc:
            raise DeviceError(f"the ledger of the emulated device cannot be opened: {exc}") from exc


# ---------------------------------------------------------------- PyTorch's caching allocator

KIB, MIB = 1 << 10, 1 << 20
ROUNDING = 512  # bytes; every block is a multiple
SMALL = MIB  # blocks up to this size come from the small pool,
SMALL_SEGMENT = 2 * MIB  # in segments of this size;
MEDIUM = 10 * MIB  # larger ones up to this size
LARGE_SEGMENT = 20 * MIB  # from segments of this size,
LARGE_ROUNDING = 2 * MIB  # and all above from segments of their own, rounded up to this


class _FullError(Exception):
    """The device has no room."""


@dataclass(eq=False)
class Block:
    """A piece of emulated memory. Free it, or let it be collected; a context manager."""

    device: EmulatedDevice
    segment: "_Segment"
    offset: int
    size: int
    pid: int = field(default_factory=os.getpid)
    is_free: bool = False

    def free(self) -> None:
        """Give it back to the process's cache."""
        if not self.is_free:
            self.is_free = True
            self.device.free(self)

    def __enter__(self) -> "Block":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.free()

    def __del__(self) -> None:
        self.free()


@dataclass(eq=False)
class _Segment:
    """What the allocator took from the device in one piece, and which parts of it are free."""

    size: int
    is_small: bool
    gaps: list[tuple[int, int]] = field(default_factory=list)  # (offset, size), sorted, never adjacent


class _Allocator:
    """The blocks and the cache of one process on one device."""

    def __init__(self, reserve: Callable[[int, int], None], context: int) -> None:
        self._reserve = reserve
        self.context = context
        self._segments: list[_Segment] = []
        self.held = 0  # context and segments
        self.allocated = 0
        self.peak = 0

    def allocate(self, nbytes: int, device: EmulatedDevice) -> Block:
        if not self.held:
            self._hold(self.context)
        size = max(ROUNDING, -(-nbytes // ROUNDING) * ROUNDING)
        segment, offset, room = self._best_fit(size) or self._grow(size)
        # What is left over is kept for others if it is worth it: torch splits large blocks only above 1 MiB.
        rest = room - size
        if rest < ROUNDING or (not segment.is_small and rest <= SMALL):
            size = room
        segment.gaps.remove((offset, room))
        if size < room:
            bisect.insort(segment.gaps, (offset + size, room - size))
        self.allocated += size
        return Block(device, segment, offset, size)

    def free(self, block: Block) -> None:
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
        except _FullError:
            self.release_cached()
            self._hold(self.held + segment.size)
        segment.gaps.append((0, segment.size))
        self._segments.append(segment)
        return segment, 0, segment.size

    def _hold(self, wanted: int) -> None:
        self._reserve(self.held, wanted)
        self.held = wanted
        self.peak = max(self.peak, wanted)
