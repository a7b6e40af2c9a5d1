"""Ends a running task that holds more than its limit."""

import threading
from collections.abc import Callable, Sequence

import psutil

from fedexec.devices.device import Device
from fedexec.errors import WorkerMemoryError
from fedexec.interface import Task
from fedexec.memory import host
from fedexec.settings import Settings

__all__ = ["Watch"]

INTERVAL_SECONDS = 0.05  # between two looks at the host, and at an emulated device
DEVICE_EVERY = 20  # looks; a real device's list of processes costs milliseconds, and holds up who computes


class Watch:
    """Looks at the workers of running tasks, in a thread of its own.

    Parameters
    ----------
    settings : Settings
        ``memory_limit``, ``device_memory_limit``.
    devices : sequence of Device
    running : callable
        Returns the tasks that run now.
    end : callable
        Called with a task and the error it ends with.
    """

    def __init__(
        self,
        settings: Settings,
        devices: Sequence[Device],
        running: Callable[[], list[Task]],
        end: Callable[[Task, WorkerMemoryError], None],
    ) -> None:
        self._host_limit, self._device_limit = settings.memory_limit, settings.device_memory_limit
        self._devices = devices if self._device_limit is not None else ()
        self._running, self._end = running, end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fedexec-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        looks = 0
        while not self._over.wait(INTERVAL_SECONDS):
            tasks = [task for task in self._running() if task.pid is not None]
            for task in tasks:
                self._check(task, host.rss_bytes(task.pid or 0), self._host_limit, "host memory")
            for device in self._devices:
                if tasks and (device.is_emulated or looks % DEVICE_EVERY == 0):
                    held = device.process_bytes() or {}
                    if not all(psutil.pid_exists(pid) for pid in held):
                        continue  # the host's pids, seen from a container: one may be a worker's by chance
                    for task in tasks:
                        self._check(task, held.get(task.pid or 0), self._device_limit, device.name)
            looks += 1

    def _check(self, task: Task, held: int | None, limit: int | None, where: str) -> None:
        if held is not None and limit is not None and held > limit and not task.doomed:
            self._end(task, WorkerMemoryError(task.name, task.pid, held, limit, where))
