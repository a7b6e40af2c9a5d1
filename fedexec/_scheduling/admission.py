"""Decides which task may start now, and on which device.

With a fixed ``max_workers`` a task starts as soon as a slot is free. If there are several devices, the task
gets the device that runs the fewest tasks; of several such devices, it gets the one that was least used when
the executor was made. With ``max_workers="auto"`` memory decides:

- The first task of a kind (a function, by name) runs alone, so that its footprint can be measured.
- From then on, a task starts if the footprint of its kind, the largest measured so far, fits into 90 % of the
  device memory that other programs did not hold before, and likewise into host memory. So
  ``floor(0.9 * (total - baseline) / footprint)`` tasks of one kind run at once.
- At most as many tasks that hold no device memory run at once as there are cores.
- If a task runs out of memory all the same, half as many tasks of its kind may run at once from then on, and
  the task runs once more, alone.
"""

import math
import random
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from fedexec._system.available_resources import available_cores
from fedexec.devices.device import Device
from fedexec.interface import NO_NEEDS, Needs, Outcome, Task, Usage
from fedexec.memory import host
from fedexec.settings import Settings

__all__ = ["Admission", "Footprint", "ceiling"]

SHARE = 0.9  # share of the memory that tasks may take: the measurement of one task does not show everything
LEAST_DEVICE_BYTES = 256 << 20  # the context alone, the least that a process holds on a real device
MOST_PER_DEVICE = 128  # tasks; limits the number of threads, has no physical reason
SAMPLE_SECONDS = 0.05


@dataclass(slots=True)
class Footprint:
    """The memory that one kind of task takes, as far as it has been measured.

    Attributes
    ----------
    host_bytes : int or None
        Largest peak of a worker's resident set in bytes; None if it was not measured.
    device_bytes : int or None
        Largest peak of a worker on its device in bytes; None if it was not measured. Then it counts as 0.
    most : int or None
        How many tasks of this kind may run at once, after one of them ran out of memory; None before that.
    at_once : int or None
        How many tasks of this kind alone can run at once: as many as memory allows and, if they need no
        device, as there are cores. None before the first of them has been measured.
    """

    host_bytes: int | None = None
    device_bytes: int | None = None
    most: int | None = None
    at_once: int | None = None


def ceiling(settings: Settings, devices: Sequence[Device]) -> int:
    """Return the number of slots that an executor can need at most.

    Parameters
    ----------
    settings : Settings
    devices : sequence of Device
        The devices on which tasks may compute.

    Returns
    -------
    int
        ``max_workers``, or with ``max_workers="auto"`` a number that depends on cores and device memory.
    """
    if not settings.auto:
        return settings.max_workers
    on_devices = (int(SHARE * (device.total_bytes() or 0) / LEAST_DEVICE_BYTES) for device in devices)
    return max(available_cores(), sum(min(MOST_PER_DEVICE, number) for number in on_devices))


@dataclass(slots=True)
class _Running:
    """A task that runs, as it was admitted."""

    kind: str
    device: Device | None
    most: int | None  # how many tasks of its kind could run at once when it started
    needs: Needs = NO_NEEDS


@dataclass(slots=True)
class _Room:
    """Bytes that tasks may take in all, measured while no task runs."""

    devices: dict[str, float] = field(default_factory=dict)
    host: float = math.inf


class Admission:
    """Decides which tasks of one executor start, and on which device.

    The methods are called under the lock of the scheduler, except :meth:`measuring`.

    Parameters
    ----------
    settings : Settings
    devices : sequence of Device
        The devices on which tasks may compute.
    fresh : bool
        Whether no worker outlives its task. If so, memory that is in use while no task runs belongs to other
        programs. If not, a worker may still hold what any earlier task has left in it, so each worker counts
        as much as the largest kind of task.
    remote : bool
        Whether tasks run on other machines, each of which decides by what it has itself.
    """

    def __init__(
        self, settings: Settings, devices: Sequence[Device], *, fresh: bool, remote: bool = False
    ) -> None:
        self._fresh, self._remote = fresh, remote
        self._auto = settings.auto
        self._share = SHARE if settings.auto else 1.0  # what a caller asks for is not measured
        self._threads = settings.threads_per_worker
        # Programs that start at the same time with few workers each must not all choose the same device.
        self._devices = sorted(devices, key=lambda device: (device.used_bytes() or 0, random.random()))
        self._cores = available_cores()
        self._ceiling = ceiling(settings, devices)
        self._footprints: dict[str, Footprint] = {}
        self._running: dict[int, _Running] = {}  # by task id
        self._alone: int | None = None  # id of the task that runs now and must run alone
        self._waiting_alone: set[int] = set()  # ids of the tasks that wait until they can run alone
        self._room = _Room()
        self._has_measured = False
        self._delta: int | None = None  # bytes that a device held beyond its baseline while a task ran alone
        self._context_bytes = 0  # the most bytes that a worker held besides what torch had reserved
        if self._auto:
            self._measure_room()

    def footprints(self) -> dict[str, Footprint]:
        """Return the footprint of each kind of task, by name of the kind."""
        return {
            kind: replace(footprint, at_once=self._at_once(footprint))
            for kind, footprint in self._footprints.items()
        }

    def _at_once(self, footprint: Footprint) -> int:
        bounds = [self._ceiling]
        if footprint.device_bytes:
            bounds.append(sum(int(room / footprint.device_bytes) for room in self._room.devices.values()))
        else:
            bounds.append(self._cores)
        if footprint.host_bytes and self._room.host < math.inf:
            bounds.append(int(self._room.host / footprint.host_bytes))
        if footprint.most is not None:
            bounds.append(footprint.most)
        return max(1, min(bounds))

    def admit(self, task: Task) -> bool:
        """Let a task start if it may, and choose its device.

        Parameters
        ----------
        task : Task
            Its attribute `device` is set if there are several devices.

        Returns
        -------
        bool
            Whether the task may start now.
        """
        if not self._auto:
            if not self._remote and not self._has_what_is_asked_for(task):
                return False
            self._start(task, self._least_busy(task.needs.device_memory or 0) or self._least_busy(0))
            return True
        if self._alone is not None or (self._waiting_alone and task.id not in self._waiting_alone):
            return False
        footprint = self._footprints.get(task.kind)
        if footprint is None and task.needs != NO_NEEDS:
            footprint = Footprint()  # no need to measure it first
        if footprint is None or task.id in self._waiting_alone:
            if self._running:
                return False
            self._measure_anew()
            self._waiting_alone.discard(task.id)
            self._alone = task.id
            self._start(task, self._roomiest(0))
            return True
        asked = self._expected(task.kind, task.needs)
        on_device = max(self._device_bytes(task.kind), task.needs.device_memory or 0)
        device = self._roomiest(on_device)
        if self._running:
            if (
                (on_device and device is None)
                or (footprint.most is not None and self._count(task.kind) >= footprint.most)
                or (not on_device and self._count_without_device() >= self._cores)
                or self._host_bytes() + (asked.host_bytes or 0) > self._room.host
                or self._lacks_threads(task)
            ):
                return False
        else:
            self._measure_anew()
        self._start(task, device or self._roomiest(0))
        return True

    def release(self, task: Task, outcome: Outcome | None) -> bool:
        """Note that a task has ended, and learn how much memory it took.

        Parameters
        ----------
        task : Task
        outcome : Outcome or None
            None if the task was cancelled before it ran.

        Returns
        -------
        bool
            True if the task must run once more, alone, because it ran out of memory beside other tasks.
        """
        started = self._running.pop(task.id)
        was_alone = self._alone == task.id
        if was_alone:
            self._alone = None
        if not self._auto or outcome is None:
            return False
        if outcome.usage is not None:
            self._learn(started.kind, outcome.usage, was_alone)
        if not outcome.out_of_memory:
            return False
        same_kind = 1 + self._count(started.kind)
        footprint = self._footprints.setdefault(started.kind, Footprint())
        if was_alone:  # the task is too large by itself, so it says nothing about how many can run at once
            return False
        if footprint.most == started.most:  # otherwise another task has halved the number meanwhile
            allowed = same_kind if footprint.most is None else min(same_kind, footprint.most)
            footprint.most = max(1, allowed // 2)
        if not task.repeatable:
            return False
        self._waiting_alone.add(task.id)
        return True

    def give_up(self, task: Task) -> None:
        """Note that a task that waits until it can run alone will not run.

        Parameters
        ----------
        task : Task
        """
        self._waiting_alone.discard(task.id)

    def measuring(self, task: Task) -> AbstractContextManager[object]:
        """Measure the whole device while a task runs alone on it, in case nobody can measure its worker.

        Parameters
        ----------
        task : Task

        Returns
        -------
        context manager
            Measures while it is open; does nothing if the task does not run alone, or uses no device.
        """
        device = self._running[task.id].device
        if self._alone != task.id or device is None:
            return nullcontext()
        return _DeltaWatch(device, self)

    # ------------------------------------------------------------

    def _learn(self, kind: str, usage: Usage, was_alone: bool) -> None:
        footprint = self._footprints.setdefault(kind, Footprint())
        device_bytes = usage.peak_device_bytes
        if device_bytes is None:
            device_bytes = self._estimate(usage.peak_reserved_bytes, self._delta if was_alone else None)
        if device_bytes is not None:
            footprint.device_bytes = max(footprint.device_bytes or 0, device_bytes)
        if usage.peak_host_bytes is not None:
            footprint.host_bytes = max(footprint.host_bytes or 0, usage.peak_host_bytes)

    def _estimate(self, reserved: int | None, delta: int | None) -> int | None:
        """Return how many bytes a worker held, if only torch and the whole device were measured.

        The delta is how much more the device held while the task ran alone; None if it did not run alone.
        """
        if delta is not None:
            self._context_bytes = max(self._context_bytes, delta - (reserved or 0))
        if reserved is None:
            return delta
        # A reused worker may have held most of this before the task began; then the delta is too small.
        return max(delta or 0, reserved + self._context_bytes)

    def _start(self, task: Task, device: Device | None) -> None:
        kind = task.kind
        footprint = self._footprints.get(kind) or Footprint()
        self._running[task.id] = _Running(kind, device, footprint.most, task.needs)
        task.device = device.uuid if device is not None and len(self._devices) > 1 else None

    def _measure_anew(self) -> None:
        """Measure the free memory while no task runs, unless idle reused workers may hold some of it."""
        if self._fresh:
            self._measure_room()

    def _measure_room(self) -> None:
        self._has_measured = True
        for device in self._devices:
            total, used = device.total_bytes(), device.used_bytes()
            if total is not None and used is not None:
                self._room.devices[device.uuid] = self._share * (total - used)
        self._room.host = self._share * host.available_bytes()

    def _has_what_is_asked_for(self, task: Task) -> bool:
        """Return whether tasks that run leave what a task asks for; the first of all tasks always gets it."""
        if task.needs != NO_NEEDS and not (self._running and self._has_measured):
            self._measure_room()
        return not self._running or not (
            (task.needs.device_memory and self._least_busy(task.needs.device_memory) is None)
            or (task.needs.memory and self._host_bytes() + task.needs.memory > self._room.host)
            or self._lacks_threads(task)
        )

    def _lacks_threads(self, task: Task) -> bool:
        """Return whether a task has to wait for threads, because it or another one has asked for some."""
        asked = [each.needs.threads for each in self._running.values()] + [task.needs.threads]
        return any(asked) and sum(number or self._threads for number in asked) > self._cores

    def _free(self, device: Device) -> float:
        taken = sum(
            max(self._device_bytes(each.kind), each.needs.device_memory or 0)
            for each in self._running.values()
            if each.device is device
        )
        return self._room.devices.get(device.uuid, 0.0) - taken

    def _device_bytes(self, kind: str) -> int:
        if not self._fresh:
            return max((footprint.device_bytes or 0 for footprint in self._footprints.values()), default=0)
        footprint = self._footprints.get(kind)
        return 0 if footprint is None else footprint.device_bytes or 0

    def _roomiest(self, needed: int) -> Device | None:
        """Return the device with the most free memory; None if it has less than the needed bytes."""
        device = max(self._devices, key=self._free, default=None)
        return None if device is None or (needed and self._free(device) < needed) else device

    def _least_busy(self, needed: int) -> Device | None:
        """Return the device that runs the fewest tasks, among those that have so many bytes left."""
        busy = [each.device for each in self._running.values()]
        fit = [device for device in self._devices if not needed or self._free(device) >= needed]
        return min(fit, key=lambda device: sum(each is device for each in busy), default=None)

    def _count(self, kind: str) -> int:
        return sum(1 for each in self._running.values() if each.kind == kind)

    def _taken(self) -> list[Footprint]:
        return [self._expected(each.kind, each.needs) for each in self._running.values()]

    def _expected(self, kind: str, needs: Needs) -> Footprint:
        """Return the larger of what was measured of a kind and what the caller asks for."""
        measured = self._footprints.get(kind) or Footprint()
        on_host = max(measured.host_bytes or 0, needs.memory or 0)
        on_device = max(measured.device_bytes or 0, needs.device_memory or 0)
        return replace(measured, host_bytes=on_host, device_bytes=on_device)

    def _count_without_device(self) -> int:
        return sum(1 for footprint in self._taken() if not footprint.device_bytes)

    def _host_bytes(self) -> int:
        return sum(footprint.host_bytes or 0 for footprint in self._taken())


class _DeltaWatch:
    """Measures repeatedly how much more a device holds than before."""

    def __init__(self, device: Device, admission: Admission) -> None:
        self._device, self._admission = device, admission
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fedexec-device-watch", daemon=True)

    def __enter__(self) -> None:
        self._admission._delta = None
        self._before = self._device.used_bytes()
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            over = self._over.wait(SAMPLE_SECONDS)
            now = self._device.used_bytes()
            if now is not None and self._before is not None:
                self._admission._delta = max(self._admission._delta or 0, now - self._before)
            if over:
                return
