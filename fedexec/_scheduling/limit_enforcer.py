"""Ends a running task whose worker holds more memory than its limit."""

import threading
from collections.abc import Callable, Sequence

from fedexec.devices.device import Device
from fedexec.errors import WorkerMemoryError
from fedexec.interface import Task
from fedexec.memory import host
from fedexec.settings import Settings

__all__ = ["LimitEnforcer"]

INTERVAL_SECONDS = 0.05  # between two measurements of the host, and of an emulated device
DEVICE_EVERY = 20  # measure real devices once in 20: it takes milliseconds, and may delay running kernels


class LimitEnforcer:
    """Compares the memory of the workers of running tasks with their limits, in a thread of its own.

    Parameters
    ----------
    settings : Settings
        ``memory_limit`` and ``device_memory_limit`` are used.
    devices : sequence of Device
        The devices on which tasks may compute.
    running : callable
        ``running()`` returns a list of the tasks that run now.
    end : callable
        ``end(task, error)`` ends the worker of the task; the error becomes the task's exception.
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
        """Stop the thread and wait until it has ended."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        measurements = 0
        while not self._over.wait(INTERVAL_SECONDS):
            tasks = [task for task in self._running() if task.pid is not None]
            for task in tasks:
                self._check(task, host.rss_bytes(task.pid or 0), self._host_limit, "host memory")
            for device in self._devices:
                if tasks and (device.is_emulated or measurements % DEVICE_EVERY == 0):
                    held = device.process_bytes() or {}
                    if not all(psutil.pid_exists(pid) for pid in held):
                        # The pids are those of the host, seen from a container: a worker here may have one
                        # of them by chance.
                        continue
                    for task in tasks:
                        self._check(task, held.get(task.pid or 0), self._device_limit, device.name)
            measurements += 1

    def _check(self, task: Task, held: int | None, limit: int | None, where: str) -> None:
        if held is not None and limit is not None and held > limit and not task.doomed:
            self._end(task, WorkerMemoryError(task.name, task.pid, held, limit, where))
