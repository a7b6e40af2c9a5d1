"""What torch's allocator says of this process's own device memory. Asking never starts a device."""

import sys
from dataclasses import dataclass
from typing import Any

__all__ = ["AllocatorReading", "read", "reset_peak"]


@dataclass(frozen=True, slots=True)
class AllocatorReading:
    """Bytes of one process on its current device: ``allocated <= reserved <= what the driver counts``.

    What the driver counts beside it (context, modules, workspaces) torch does not know. A peak that the
    backend does not keep is None.
    """

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None


def read() -> AllocatorReading | None:
    """Return the figures; None where torch is not loaded, or has not touched a device that keeps count."""
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
    except (AttributeError, RuntimeError):  # an older torch, a backend that does not count
        pass
    return None


def reset_peak() -> None:
    """Have the peaks begin anew, if there are any."""
    backend = _started(sys.modules.get("torch"))
    if backend is not None:
        try:
            backend.reset_peak_memory_stats()
        except (AttributeError, RuntimeError):
            pass


def _started(torch: Any) -> Any:
    """Return torch's module for the device this process has started: ``torch.cuda`` (ROCm too), or another.

    Not through ``torch.accelerator``: its ``is_available()`` may start the driver, after which this process
    cannot fork any more.
    """
    for name in ("cuda", "xpu"):
        backend = getattr(torch, name, None)
        if backend is not None and backend.is_initialized():
            return backend
    return None
