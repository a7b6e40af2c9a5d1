"""An EMULATED accelerator: a capacity that real processes fill, for machines that have none.

``FEDEXEC_DEVICE=emulated:24GiB`` makes one; ``emulated:2x24GiB`` two; ``emulated:24GiB,context=450MiB`` says
what a process takes before its first byte. It emulates what matters to isolation:

- A process that allocates holds a context, and what PyTorch's caching allocator would have reserved for it.
  Both come back only when the process has *ended*, however it ended; a forked child keeps what its parent
  held, as on a real GPU.
- All processes of one program share the capacity. Beyond it an allocation fails as in torch.

It computes nothing and takes no real memory. No figure it gives is a real device's, and every one says so.

The kernel keeps the books of who holds how much (:mod:`~fedexec.devices.emulated.ledger`), so that whatever
ends a process ends what it held. What a process needs follows PyTorch's rules
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
        self._ledger = Ledger(ledger)
        self._allocator = CachingAllocator(self._reserve, context)
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

    def allocate(self, nbytes: int) -> Block:
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
                return allocator.allocate(nbytes, self.free)
            except FullError:
                raise self._out_of_memory(nbytes) from None

    def free(self, block: Block) -> None:
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
    def _own(self) -> Iterator[CachingAllocator]:
        """Lend the books of this process, up to date; one that was forked begins with nothing.

        What its parent held stays locked as long as the descriptor it inherited is open.
        """
        with self._lock:
            if self._ledger.disown():
                self._allocator = CachingAllocator(self._reserve, self._allocator.context)
            while self._freed:
                block = self._freed.popleft()
                if block.pid == os.getpid():
                    self._allocator.free(block)
            yield self._allocator

    def _reserve(self, held: int, wanted: int) -> None:
        """Hold `wanted` bytes instead of `held`; FullError if they are not there."""
        with self._ledger.exclusive():
            if wanted > held and self._ledger.used() - held + wanted > self.capacity:
                raise FullError
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
            EmulatedDevice(index, capacity, context, path) for index, path in enumerate(ledgers(count))
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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def _parse(spec: str) -> tuple[int, int, int]:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise SettingsError(f"{spec!r} is no emulated device. Write it like emulated:24GiB,context=450MiB")
    count, capacity, context = int(match[1] or 1), parse_size(match[2] or DEFAULT_CAPACITY), match[3]
    context_bytes = parse_size(context or DEFAULT_CONTEXT)
    if count < 1 or context_bytes >= capacity or capacity >= Ledger.SPAN:
        raise SettingsError(f"{spec!r}: at least one device, larger than its context, smaller than 1 TiB")
    return count, capacity, context_bytes
