"""An EMULATED accelerator, whose capacity real processes fill, for machines that have no real one.

``FEDEXEC_DEVICE=emulated:24GiB`` makes one, ``emulated:2x24GiB`` makes two, and
``emulated:24GiB,context=450MiB`` sets how much a process holds before its first block. The emulation covers
what matters to isolation:

- A process that allocates holds a context, and what PyTorch's caching allocator would have reserved for it.
  Both are given back only when the process has *ended*, however it ended. A forked child keeps what its
  parent held, as on a real GPU.
- All processes of one program share the capacity. An allocation beyond it fails as in torch.

The device computes nothing and takes no real memory. None of its values is that of a real device, and its
name says so.

The kernel records how much each process holds (:mod:`~fedexec.devices.emulated.ledger`), so that the record
of a process ends with the process, whatever ended it. What a process needs follows PyTorch's rules
(:mod:`~fedexec.devices.emulated.caching`). Linux only.
"""

import contextlib
import logging
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping

from fedexec._system.sizes import format_size, parse_size
from fedexec.devices.device import Device, assigned, is_emulated
from fedexec.devices.emulated.caching import Block, CachingAllocator, FullError
from fedexec.devices.emulated.ledger import Ledger, ledgers
from fedexec.errors import DeviceError, SettingsError

__all__ = ["DeviceMemoryError", "EmulatedDevice", "device", "devices"]

log = logging.getLogger("fedexec")

DEFAULT_CAPACITY = "24GiB"
DEFAULT_CONTEXT = "450MiB"  # for CUDA 11.7 and later with lazy loading, 300 to 721 MiB are published

_SPEC = re.compile(r"emulated(?::(?:(\d+)x)?([^,]+)(?:,context=([^,]+))?)?")


class DeviceMemoryError(RuntimeError):
    """The emulated device is full. If torch is loaded, its ``OutOfMemoryError`` is raised instead."""


class EmulatedDevice(Device):
    """One emulated device.

    Parameters
    ----------
    index : int
    capacity, context : int
        Bytes of the device, and of the context of a process on it.
    ledger : str
        Path of the ledger of the device.
    """

    def __init__(self, index: int, capacity: int, context: int, ledger: str) -> None:
        self.uuid = f"EMULATED-{index}"
        self.name = f"EMULATED GPU {index}, {format_size(capacity)}, context {format_size(context)}"
        self.capacity = capacity
        self._ledger = Ledger(ledger)
        self._allocator = CachingAllocator(self._reserve, context)
        self._freed: deque[Block] = deque()
        self._lock = threading.Lock()
        self._warned = False

    def total_bytes(self) -> int:
        """Return the capacity in bytes."""
        return self.capacity

    def used_bytes(self) -> int | None:
        """Return how many bytes all processes hold together; None if the ledger no longer exists."""
        held = self.process_bytes()
        return None if held is None else sum(held.values())

    def process_bytes(self) -> Mapping[int, int] | None:
        """Return how many bytes each process holds, by pid.

        Returns
        -------
        mapping of int to int, or None
            None if the ledger no longer exists, because the process that made it has ended.
        """
        try:
            return self._ledger.read()
        except DeviceError as exc:
            if not self._warned:
                log.warning("%s: its memory cannot be measured: %s", self.name, exc)
            self._warned = True
            return None

    # ------------------------------------------------------------ for the process that computes

    def allocate(self, nbytes: int) -> Block:
        """Allocate memory for this process.

        Parameters
        ----------
        nbytes : int

        Returns
        -------
        Block
            When it is freed, its memory goes back to the cache of the process, and not to the device.

        Raises
        ------
        torch.OutOfMemoryError, or DeviceMemoryError if torch is not loaded
            The block does not fit, even after unused segments of the cache have been given back.
        """
        if nbytes < 0:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        with self._own() as allocator:
            try:
                return allocator.allocate(nbytes, self.free)
            except FullError:
                raise self._out_of_memory(nbytes) from None

    def free(self, block: Block) -> None:
        """Give a block back to the cache of this process.

        Parameters
        ----------
        block : Block
        """
        self._freed.append(block)  # take no lock here, because a finalizer may call this

    def empty_cache(self) -> None:
        """Give back the segments of the cache that are not in use; the context stays."""
        with self._own() as allocator:
            allocator.release_cached()

    def allocated_bytes(self) -> int:
        """Return how many bytes the blocks of this process take."""
        with self._own() as allocator:
            return allocator.allocated

    def held_bytes(self) -> int:
        """Return how many bytes this process holds: its context, its blocks and its cache."""
        with self._own() as allocator:
            return allocator.held

    @property
    def context_bytes(self) -> int:
        """Return how many bytes a process holds before its first block."""
        return self._allocator.context

    def peak_bytes(self) -> int:
        """Return the most bytes that this process has held since :meth:`reset_peak`."""
        with self._own() as allocator:
            return allocator.peak

    def reset_peak(self) -> None:
        """Reset the peak of this process."""
        with self._own() as allocator:
            allocator.peak = allocator.held

    @contextlib.contextmanager
    def _own(self) -> Iterator[CachingAllocator]:
        """Lend the allocator of this process, up to date. In a forked process the allocator begins empty.

        What the parent held stays locked as long as the inherited descriptor is open.
        """
        with self._lock:
            if self._ledger.disown():
                self._allocator = CachingAllocator(self._reserve, self._allocator.context)
            while self._freed:
                block = self._freed.popleft()
                if block.pid == os.getpid():
                    self._allocator.free(block)
            yield self._allocator

    def _reserve(self, held: int, needed: int) -> None:
        """Hold `needed` bytes instead of `held`; raise FullError if the device has too little free memory."""
        with self._ledger.exclusive():
            if needed > held and self._ledger.used() - held + needed > self.capacity:
                raise FullError
            self._ledger.write(held, needed)

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
    """Return the emulated devices of this program; they are made at the first call.

    Parameters
    ----------
    spec : str
        ``emulated[:[N x]SIZE[,context=SIZE]]``, without spaces.

    Returns
    -------
    tuple of EmulatedDevice

    Raises
    ------
    SettingsError
        The text does not describe an emulated device.
    DeviceError
        The ledger that this process has inherited cannot be opened.
    """
    if spec not in _made:
        count, capacity, context = _parse(spec)
        _made[spec] = tuple(
            EmulatedDevice(index, capacity, context, path) for index, path in enumerate(ledgers(count))
        )
    return _made[spec]


def device() -> EmulatedDevice:
    """Return the emulated device on which this process computes: the assigned device, else the first.

    Returns
    -------
    EmulatedDevice

    Raises
    ------
    DeviceError
        ``FEDEXEC_DEVICE`` does not name an emulated device.
    """
    spec = os.environ.get("FEDEXEC_DEVICE", "")
    if not is_emulated(spec):
        raise DeviceError(
            f"FEDEXEC_DEVICE={spec!r} does not name an emulated device. Write it like emulated:24GiB"
        )
    all_ = devices(spec)
    return next((each for each in all_ if each.uuid == assigned()), all_[0])


_made: dict[str, tuple[EmulatedDevice, ...]] = {}


def _renew_locks() -> None:
    """Replace locks in a forked process, because threads that hold them exist only in the parent."""
    for devices_of_spec in _made.values():
        for each in devices_of_spec:
            each._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _parse(spec: str) -> tuple[int, int, int]:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise SettingsError(
            f"{spec!r} does not describe an emulated device. Write it like emulated:24GiB,context=450MiB"
        )
    count, capacity, context = int(match[1] or 1), parse_size(match[2] or DEFAULT_CAPACITY), match[3]
    context_bytes = parse_size(context or DEFAULT_CONTEXT)
    if count < 1 or context_bytes >= capacity or capacity >= Ledger.SPAN:
        raise SettingsError(
            f"{spec!r}: there must be at least one device, larger than its context and smaller than 1 TiB"
        )
    return count, capacity, context_bytes
