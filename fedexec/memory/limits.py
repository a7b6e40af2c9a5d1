"""Which workers hold too much after a task, and how many were replaced for it."""

import logging
import threading
from collections import Counter

from fedexec.interface import Usage
from fedexec.settings import Settings, format_size

__all__ = ["Limits"]

log = logging.getLogger("fedexec")


class Limits:
    """The limits of one executor's workers, for a backend that reuses them. Safe to use from many threads.

    Parameters
    ----------
    settings : Settings
        ``memory_limit`` and ``device_memory_limit``.
    """

    def __init__(self, settings: Settings) -> None:
        self._host, self._device = settings.memory_limit, settings.device_memory_limit
        self._lock = threading.Lock()
        self._replaced: Counter[str] = Counter()
        self._warned = False

    def exceeded(self, usage: Usage | None) -> bool:
        """Return whether a worker must not serve again; it is counted as replaced if so."""
        if usage is None:
            return False
        cause = None
        if self._host is not None and (usage.end_host_bytes or 0) > self._host:
            cause = "host memory"
            self._warn_if_too_low(usage.idle_host_bytes, self._host)
        elif self._device is not None and (usage.end_device_bytes or 0) > self._device:
            cause = "device memory"
        if cause is None:
            return False
        with self._lock:
            self._replaced[cause] += 1
        return True

    def replaced(self) -> dict[str, int]:
        """Return cause ("host memory", "device memory") to number of workers."""
        with self._lock:
            return dict(self._replaced)

    def _warn_if_too_low(self, idle: int | None, limit: int) -> None:
        if idle is not None and idle > limit and not self._warned:
            self._warned = True
            log.warning(
                "memory_limit=%s is less than the %s a worker holds before any task: each gets a new worker",
                format_size(limit),
                format_size(idle),
            )
