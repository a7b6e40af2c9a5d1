"""Which task may start now, and on which device.

With a fixed ``max_workers`` every task may, as soon as a slot is free; where there are several devices it
gets the one with the fewest tasks, and of these the one that held least when the executor was made. With
``max_workers="auto"`` memory decides:

- The first task of a kind (a function, by name) runs alone and is measured.
- From then on a task starts if its kind's footprint, the largest seen so far, fits into 90 % of what the
  device has beyond what others held before, and likewise into the host's memory. So ``floor(0.9 * (total -
  baseline) / footprint)`` of one kind run at once.
- Tasks that hold no device memory are bounded by the cores as well.
- If one runs out of memory all the same, the number for its kind is halved, and it is tried once more, alone.
"""

import math
import random
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from fedexec._system.machine import available_cores
from fedexec.devices.device import Device
from fedexec.interface import Outcome, Task, Usage
from fedexec.memory import host
from fedexec.settings import Settings

__all__ = ["Admission", "Footprint", "ceiling"]

SHARE = 0.9  # of the memory that is there; the rest is for what a measurement of one task does not show
LEAST_DEVICE_BYTES = 256 << 20  # what a process holds on a real device at least: its context
MOST_PER_DEVICE = 128  # tasks; a bound for the number of threads, not for anything physical
SAMPLE_SECONDS = 0.05


@dataclass(slots=True)
class Footprint:
    """What one kind of task takes, as far as it has been measured.

    Attributes
    ----------
    host_bytes : int or None
        The largest peak of a worker's resident set; None if it was not measured.
    device_bytes : int or None
        The largest peak of a worker on its device; None if it was not measured, and counted as nothing then.
    most : int or None
        How many may run at once, after one ran out of memory.
    at_once : int or None
        How many of this kind alone the machine holds at once, by memory and, if they need no device, by
        cores; None before the first has been measured.
    """

    host_bytes: int | None = None
    device_bytes: int | None = None
    most: int | None = None
    at_once: int | None = None


def ceiling(settings: Settings, devices: Sequence[Device]) -> int:
    """Return how many slots there can ever be use for."""
    if not settings.auto:
        return settings.max_workers
    on_devices = (int(SHARE * (device.total_bytes() or 0) / LEAST_DEVICE_BYTES) for device in devices)
    return max(available_cores(), sum(min(MOST_PER_DEVICE, number) for number in on_devices))


@dataclass(slots=True)
class _Running:
    kind: str
    device: Device | None
    most: int | None  # of its kind at once, when it started


@dataclass(slots=True)
class _Room:
    """What may be filled: measured while nothing of ours runs."""

    devices: dict[str, float] = field(default_factory=dict)
    host: float = math.inf


class Admission:
    """Decides for one executor. Its methods are called under the executor's lock, but for :meth:`measuring`.

    Parameters
    ----------
    settings : Settings
    devices : sequence of Device
    fresh : bool
        No worker outlives its task: what is used while nothing runs is other people's. Else a worker may hold
        what any earlier task left in it, and each counts as much as the largest kind.
    """

    def __init__(self, settings: Settings, devices: Sequence[Device], *, fresh: bool) -> None:
        self._fresh = fresh
        self._auto = settings.auto
        # Several programs that start at once, each with a worker or two, must not all begin with the first.
        self._devices = sorted(devices, key=lambda device: (device.used_bytes() or 0, random.random()))
        self._cores = available_cores()
        self._ceiling = ceiling(settings, devices)
        self._footprints: dict[str, Footprint] = {}
        self._running: dict[int, _Running] = {}  # task id -> what it was admitted as
        self._alone: int | None = None  # id of the task that shall have no company
        self._lonely: set[int] = set()  # ids of those that wait to have none
        self._room = _Room()
        self._delta: int | None = None  # what a device held beyond its baseline while a task ran alone there
        self._beside = 0  # what a worker was seen to hold so beside what torch has reserved: its context
        if self._auto:
            self._measure_room()

    def footprints(self) -> dict[str, Footprint]:
        """Return kind of task to what it takes."""
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
        """Let a task start if it may, and choose its device (``task.device``, where there are several)."""
        if not self._auto:
            self._start(task, self._least_busy())
            return True
        if self._alone is not None or (self._lonely and task.id not in self._lonely):
            return False
        footprint = self._footprints.get(task.kind)
        if footprint is None or task.id in self._lonely:
            if self._running:
                return False
            self._begin_anew()
            self._lonely.discard(task.id)
            self._alone = task.id
            self._start(task, self._roomiest(0))
            return True
        device = self._roomiest(self._device_bytes(task.kind))
        if self._running:
            if (
                (footprint.device_bytes and device is None)
                or (footprint.most is not None and self._count(task.kind) >= footprint.most)
                or (not footprint.device_bytes and self._without_device() >= self._cores)
                or self._host_bytes() + (footprint.host_bytes or 0) > self._room.host
            ):
                return False
        else:
            self._begin_anew()
        self._start(task, device or self._roomiest(0))
        return True

    def release(self, task: Task, outcome: Outcome | None) -> bool:
        """Note that a task has ended, and what it took.

        Parameters
        ----------
        outcome : Outcome or None
            None if it was cancelled before it ran.

        Returns
        -------
        bool
            It ran out of memory in company: admit it once more, when it will have none.
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
        same = 1 + self._count(started.kind)
        footprint = self._footprints.setdefault(started.kind, Footprint())
        if was_alone:  # too large by itself, which says nothing of how many others fit
            return False
        if footprint.most == started.most:  # else it ran among those that another has halved since
            footprint.most = max(1, (same if footprint.most is None else min(same, footprint.most)) // 2)
        if not task.repeatable:
            return False
        self._lonely.add(task.id)
        return True

    def give_up(self, task: Task) -> None:
        """Note that a task that waits to be alone will not run."""
        self._lonely.discard(task.id)

    def measuring(self, task: Task) -> AbstractContextManager[object]:
        """Watch its device while a task runs alone, for where nobody can tell whose bytes are whose."""
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
        """Return what a worker held of which only torch tells; the delta is that of a task that ran alone."""
        if delta is not None:
            self._beside = max(self._beside, delta - (reserved or 0))
        if reserved is None:
            return delta
        # A reused worker may have held most of it before the task began: then the delta is too small.
        return max(delta or 0, reserved + self._beside)

    def _start(self, task: Task, device: Device | None) -> None:
        kind = task.kind
        footprint = self._footprints.get(kind) or Footprint()
        self._running[task.id] = _Running(kind, device, footprint.most)
        task.device = device.uuid if device is not None and len(self._devices) > 1 else None

    def _begin_anew(self) -> None:
        """Nothing runs: what is used now is other people's, unless idle workers hold something."""
        if self._fresh:
            self._measure_room()

    def _measure_room(self) -> None:
        for device in self._devices:
            total, used = device.total_bytes(), device.used_bytes()
            if total is not None and used is not None:
                self._room.devices[device.uuid] = SHARE * (total - used)
        self._room.host = SHARE * host.available_bytes()

    def _free(self, device: Device) -> float:
        taken = sum(self._device_bytes(each.kind) for each in self._running.values() if each.device is device)
        return self._room.devices.get(device.uuid, 0.0) - taken

    def _device_bytes(self, kind: str) -> int:
        if not self._fresh:
            return max((footprint.device_bytes or 0 for footprint in self._footprints.values()), default=0)
        footprint = self._footprints.get(kind)
        return 0 if footprint is None else footprint.device_bytes or 0

    def _roomiest(self, needed: int) -> Device | None:
        """Return the device with most room, None if that is not enough."""
        device = max(self._devices, key=self._free, default=None)
        return None if device is None or (needed and self._free(device) < needed) else device

    def _least_busy(self) -> Device | None:
        busy = [each.device for each in self._running.values()]
        return min(self._devices, key=lambda device: sum(each is device for each in busy), default=None)

    def _count(self, kind: str) -> int:
        return sum(1 for each in self._running.values() if each.kind == kind)

    def _taken(self) -> list[Footprint]:
        return [self._footprints.get(each.kind) or Footprint() for each in self._running.values()]

    def _without_device(self) -> int:
        return sum(1 for footprint in self._taken() if not footprint.device_bytes)

    def _host_bytes(self) -> int:
        return sum(footprint.host_bytes or 0 for footprint in self._taken())


class _DeltaWatch:
    """Samples how much more a device holds than before."""

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
