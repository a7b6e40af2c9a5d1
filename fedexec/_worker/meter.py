"""Measures the usage of one task inside its worker."""

import os
import time
from dataclasses import dataclass

from fedexec._worker.imports import Imports
from fedexec.interface import Usage
from fedexec.memory import host, self_usage

__all__ = ["TaskMeter", "ThisWorker", "this_worker"]


@dataclass(slots=True)
class ThisWorker:
    """The set-up of this worker, as far as the usage of its tasks mentions it.

    Attributes
    ----------
    failure : bytes or None
        Packed reply to every task if the set-up failed; None if it did not fail.
    setup_seconds : float or None
        Seconds that preload and initializer took.
    idle_bytes : int or None
        Resident set before the first task, in bytes.
    """

    failure: bytes | None = None
    setup_seconds: float | None = None
    idle_bytes: int | None = None


this_worker = ThisWorker()


class TaskMeter:
    """Measures one task in this process, from the moment at which this object is made.

    Parameters
    ----------
    new : Imports
        The imports since the message arrived.
    unpickling : float
        Seconds that unpickling the call took.
    """

    def __init__(self, new: Imports, unpickling: float) -> None:
        self._new, self._unpickling = new, unpickling
        self._peak_was_reset = host.reset_peak()  # otherwise the peak is that of an earlier task
        self_usage.reset_peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Usage:
        """Return the usage of the task until now."""
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        peak, resident = host.peak_and_rss()
        on_device = self_usage.read()
        return Usage(
            worker_pid=os.getpid(),
            wall_seconds=wall,
            cpu_seconds=cpu,
            peak_host_bytes=peak if self._peak_was_reset else None,
            end_host_bytes=resident,
            idle_host_bytes=this_worker.idle_bytes,
            device=on_device.uuid,
            peak_device_bytes=on_device.peak_bytes,
            end_device_bytes=on_device.held_bytes,
            peak_allocated_bytes=on_device.torch.peak_allocated_bytes if on_device.torch else None,
            peak_reserved_bytes=on_device.torch.peak_reserved_bytes if on_device.torch else None,
            import_seconds=self._new.seconds(),
            unpickle_seconds=self._unpickling,
            setup_seconds=this_worker.setup_seconds,
        )
