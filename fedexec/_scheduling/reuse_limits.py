"""Decides which reused workers hold too much memory after a task, and counts how many were replaced."""

import logging
import threading
from collections import Counter

from fedexec._system.sizes import format_size
from fedexec.interface import Usage
from fedexec.settings import Settings

__all__ = ["Limits"]

log = logging.getLogger("fedexec")


class Limits:
    """The memory limits of one executor's workers, for a backend that reuses them. Thread-safe.

    Parameters
    ----------
    settings : Settings
        ``memory_limit`` and ``device_memory_limit`` are used.
    """

    def __init__(self, settings: Settings) -> None:
        self._host, self._device = settings.memory_limit, settings.device_memory_limit
        self._lock = threading.Lock()
        self._replaced: Counter[str] = Counter()
        self._warned: set[str] = set()

    def exceeded(self, usage: Usage | None) -> bool:
        """Return whether a worker must be replaced; if so, the worker is counted as replaced.

        Parameters
        ----------
        usage : Usage or None
            Usage of the task that the worker has just run; None if it was not measured.

        Returns
        -------
        bool
            True if the worker holds more than a limit.
        """
        if usage is None:
            return False
        if self._device is not None and usage.end_device_bytes is None and usage.may_hold_device:
            self._warn_unknown()
        for cause, limit, held, bare in (
            ("host memory", self._host, usage.end_host_bytes, usage.idle_host_bytes),
            ("device memory", self._device, usage.end_device_bytes, _context_bytes(usage)),
        ):
            if limit is not None and held is not None and held > limit:
                self._count(cause, limit, bare)
                return True
        return False

    def replaced(self) -> dict[str, int]:
        """Return the number of replaced workers by cause ("host memory" or "device memory")."""
        with self._lock:
            return dict(self._replaced)

    def _count(self, cause: str, limit: int, bare: int | None) -> None:
        """Count a worker as replaced, and warn once if a worker exceeds the limit before it runs any task."""
        with self._lock:
            self._replaced[cause] += 1
            if bare is None or bare <= limit or cause in self._warned:
                return
            self._warned.add(cause)
        log.warning(
            "the limit of %s is %s, less than the %s that a worker holds before it runs any task, "
            "so every task gets a new worker; raise the limit",
            cause,
            format_size(limit),
            format_size(bare),
        )

    def _warn_unknown(self) -> None:
        with self._lock:
            if "unknown" in self._warned:
                return
            self._warned.add("unknown")
        log.warning(
            "the limit of device memory cannot be kept, because the driver does not say how much memory "
            "a worker holds"
        )


def _context_bytes(usage: Usage) -> int | None:
    """Return how much of its device a worker holds at least, besides the blocks of the allocator."""
    if usage.end_device_bytes is None or usage.peak_reserved_bytes is None:
        return None
    return usage.end_device_bytes - usage.peak_reserved_bytes
