"""What one task costs, as its worker measures it."""

import os
import time
from dataclasses import dataclass

from fedexec._worker.imports import Imports
from fedexec.interface import Usage
from fedexec.memory import host, self_usage

__all__ = ["TaskMeter", "ThisWorker", "this_worker"]


@dataclass(slots=True)
class ThisWorker:
    """How this process was made a worker; each task's usage tells it.

    Attributes
    ----------
    failure : bytes or None
        A packed reply, if the set-up failed: it answers every task.
    setup_seconds : float or None
        What preload and initializer took.
    idle_bytes : int or None
        Resident set before the first task.
    """

    failure: bytes | None = None
    setup_seconds: float | None = None
    idle_bytes: int | None = None


this_worker = ThisWorker()


class TaskMeter:
    """Measures one task in this process."""

    def __init__(self, new: Imports, unpickling: float) -> None:
        self._new, self._unpickling = new, unpickling
        self._peak_is_ours = host.reset_peak()  # else an earlier task's peak would be read
        self_usage.reset_peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Usage:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        peak, resident = host.peak_and_rss()
        on_device = self_usage.read()
        return Usage(
            worker_pid=os.getpid(),
            wall_seconds=wall,
            cpu_seconds=cpu,
            peak_host_bytes=peak if self._peak_is_ours else None,
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
