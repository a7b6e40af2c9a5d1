"""Asks torch's allocator about this process's own device memory. Asking never starts a device."""

import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["AllocatorReading", "read", "reset_peak"]


@dataclass(frozen=True, slots=True)
class AllocatorReading:
    """Bytes of this process on its current device: ``allocated <= reserved <= what the driver counts``.

    The driver also counts the context, modules and workspaces, which torch does not know. A peak is None if
    torch's module for the device does not keep it.
    """

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None


def read() -> AllocatorReading | None:
    """Return the allocator's values; None if torch is not loaded or has not used a device that counts."""
    torch: Any = sys.modules.get("torch")
    backend = _started(torch)
    try:
        if backend is not None:
            return AllocatorReading(
                int(backend.memory_allocated()),
                int(backend.memory_reserved()),
                int(backend.max_memory_allocated()),
                int(backend.max_memory_reserved()),
            )
        if sys.platform == "darwin" and torch is not None and torch.backends.mps.is_available():
            return AllocatorReading(
                int(torch.mps.current_allocated_memory()), int(torch.mps.driver_allocated_memory())
            )
    except (AttributeError, RuntimeError):  # an older torch, or a device whose module does not count
        pass
    return None


def reset_peak() -> None:
    """Reset the peaks of the allocator, if there are any."""
    backend = _started(sys.modules.get("torch"))
    if backend is not None:
        try:
            backend.reset_peak_memory_stats()
        except (AttributeError, RuntimeError):
            pass


def _started(torch: Any) -> Any:
    """Return torch's module for the device that this process has started, such as ``torch.cuda`` (also ROCm).

    ``torch.accelerator`` would not do: its ``is_available()`` may start the driver, after which this process
    could not be forked any more.
    """
    for name in ("cuda", "xpu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_initialized():
            return backend
    return None
