"""A backend and devices of which nothing is real, so that what decides can be tested without a process."""

import signal
import threading

from fedexec.devices import Device
from fedexec.errors import WorkerDiedError
from fedexec.interface import Backend, Capability, Hooks, Outcome, Usage
from fedexec.settings import resolve

DEADLINE = 10.0


class FakeBackend(Backend):
    """Runs a task in the thread that brings it; a task that calls :meth:`hang` ends when it is killed."""

    capabilities = Capability.ISOLATED | Capability.SURVIVES_DEATH | Capability.KILLS_ONE

    def __init__(self, **arguments):
        super().__init__(resolve({"device": "none"} | arguments, environ={}), Hooks())
        self.ran = []  # the tasks' first arguments, in the order in which they ran
        self.signals = []  # that were sent, in order
        self.heeds = signal.SIGTERM  # the first signal that ends a worker
        self.deaths = {}  # a task's first argument -> how often its worker shall die
        self.shutdowns = 0
        self._killed = threading.Event()
        self._lock = threading.Lock()

    def run(self, task):
        with self._lock:
            self.ran.append(task.args[0])
            self.deaths[task.args[0]] = left = self.deaths.get(task.args[0], 0) - 1
        if left >= 0:
            raise WorkerDiedError(7, -signal.SIGKILL, task.name)
        try:
            return Outcome(value=task.fn(*task.args))
        except WorkerDiedError:
            raise
        except Exception as exc:
            return Outcome(exception=exc)

    def hang(self, number):
        """Wait until the worker is killed; a task."""
        assert self._killed.wait(DEADLINE)
        raise WorkerDiedError(7, -self.signals[-1], "hang")

    def kill(self, task, number=signal.SIGKILL):
        self.signals.append(int(number))
        if number in (self.heeds, signal.SIGKILL):
            self._killed.set()

    def shutdown(self):
        self.shutdowns += 1


class FakeDevice(Device):
    """A device that has a capacity, and of which others use a part."""

    def __init__(self, uuid, total, used=0):
        self.uuid, self.name = uuid, uuid
        self.total, self.used = total, used

    def total_bytes(self):
        return self.total

    def used_bytes(self):
        return self.used

    def process_bytes(self):
        return {}


def usage(*, device=None, host=None):
    """Return what a task is said to have cost, in bytes."""
    return Usage(
        worker_pid=7, wall_seconds=1.0, cpu_seconds=1.0, peak_device_bytes=device, peak_host_bytes=host
    )
