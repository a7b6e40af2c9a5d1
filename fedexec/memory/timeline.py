"""How much memory was held when: of the host by this program's processes, of each device by everybody.

A :class:`Timeline` samples while it is open, and takes *marks*: what was held at a moment that means
something, such as the end of a round. Who held it, the tasks' own records tell: ``future.usage``, ``started``
and ``ended``.

What a mark finds beyond the baseline is a *residual*: memory that outlived the work it was taken for.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from fedexec.devices.device import Device
from fedexec.memory import host

__all__ = ["Mark", "Series", "Timeline"]

DEVICE_SECONDS = 0.05  # between two looks at the devices; one costs some microseconds
HOST_SECONDS = 1.0  # at least, between two looks at the host
HOST_SHARE = 0.01  # of the time, at most, is spent on looking: the kernel holds up who is looked at
MOST_POINTS = 2048


@dataclass(slots=True)
class Series:
    """What was measured one after the other. Never more than 2048 points: then neighbours become one.

    Attributes
    ----------
    seconds : list of float
        Since the timeline began.
    nbytes : list of int
        Of two points that became one, the larger.
    peak : int or None
        None if nothing was measured.
    """

    seconds: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    _step: float = 0.0  # seconds that one point stands for

    @property
    def peak(self) -> int | None:
        """Return the largest."""
        return max(self.nbytes, default=None)

    def add(self, seconds: float, nbytes: int | None) -> None:
        """Add a point; one that was not measured is left out."""
        if nbytes is None:
            return
        if self.seconds and seconds < self.seconds[-1] + self._step:
            self.nbytes[-1] = max(self.nbytes[-1], nbytes)
            return
        self.seconds.append(seconds)
        self.nbytes.append(nbytes)
        if len(self.seconds) == MOST_POINTS:
            self._step = 2 * (seconds - self.seconds[0]) / MOST_POINTS
            self.seconds = self.seconds[::2]
            self.nbytes = [max(pair) for pair in zip(self.nbytes[::2], self.nbytes[1::2], strict=True)]


@dataclass(frozen=True, slots=True)
class Mark:
    """What was held at one moment. What was not measured is None.

    Attributes
    ----------
    seconds : float
        Since the timeline began.
    label : str
        "round", "shutdown", or what the caller says.
    server_round : int or None
    host_bytes : int or None
        PSS of this process and all its descendants.
    device_bytes : dict of str to (int or None)
        UUID to what is held beyond what was when the timeline began.
    """

    seconds: float
    label: str
    server_round: int | None
    host_bytes: int | None
    device_bytes: dict[str, int | None]


class Timeline:
    """Samples from its creation until :meth:`close`; a context manager.

    Parameters
    ----------
    devices : sequence of Device
        ``executor.devices``.

    Attributes
    ----------
    began : float
        Seconds since the epoch.
    watched : tuple of Device
    host : Series
        PSS of this process and all its descendants, once a second or less often.
    devices : dict of str to Series
        UUID to what is held beyond the baseline, 20 times a second.
    baseline : dict of str to (int or None)
        UUID to what others held before. None: not measured, and then neither is what comes after.
    marks : list of Mark
    """

    def __init__(self, devices: Sequence[Device] = ()) -> None:
        self.began = time.time()
        self._zero = time.monotonic()
        self.watched = tuple(devices)
        self.baseline = {device.uuid: device.used_bytes() for device in devices}
        self.host = Series()
        self.devices = {device.uuid: Series() for device in devices}
        self.marks: list[Mark] = []
        self._lock = threading.Lock()  # guards what is measured
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="fedexec-timeline", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Timeline":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop sampling."""
        self._over.set()
        self._thread.join()

    def mark(self, label: str, server_round: int | None = None) -> Mark:
        """Measure now, and remember what for. Takes milliseconds for each process."""
        mark = Mark(self._now(), label, server_round, host.tree_bytes(), self._held())
        with self._lock:
            self.marks.append(mark)
            self.host.add(mark.seconds, mark.host_bytes)
            self._add_held(mark.seconds, mark.device_bytes)
        return mark

    def residual_bytes(self, uuid: str, label: str) -> int | None:
        """Return the most that marks of that label found on a device; None if one of them did not measure."""
        with self._lock:
            found = [mark.device_bytes[uuid] for mark in self.marks if mark.label == label]
        return None if None in found else max((held for held in found if held is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON knows it."""
        with self._lock:
            return {
                "began": self.began,
                "host": _points(self.host),
                "devices": {
                    device.uuid: {
                        "name": device.name,
                        "total_bytes": device.total_bytes(),
                        "baseline_bytes": self.baseline[device.uuid],
                        **_points(self.devices[device.uuid]),
                    }
                    for device in self.watched
                },
                "marks": [asdict(mark) for mark in self.marks],
            }

    def _now(self) -> float:
        return round(time.monotonic() - self._zero, 4)

    def _held(self) -> dict[str, int | None]:
        held: dict[str, int | None] = {}
        for device in self.watched:
            before, now = self.baseline[device.uuid], device.used_bytes()
            held[device.uuid] = None if before is None or now is None else max(0, now - before)
        return held

    def _add_held(self, seconds: float, held: dict[str, int | None]) -> None:
        for uuid, nbytes in held.items():
            self.devices[uuid].add(seconds, nbytes)

    def _sample(self) -> None:
        look_at_host = 0.0
        while not self._over.wait(DEVICE_SECONDS if self.watched else HOST_SECONDS):
            seconds, held = self._now(), self._held()
            with self._lock:
                self._add_held(seconds, held)
            if seconds >= look_at_host:
                nbytes = host.tree_bytes()
                with self._lock:
                    self.host.add(seconds, nbytes)
                look_at_host = seconds + max(HOST_SECONDS, (self._now() - seconds) / HOST_SHARE)


def _points(series: Series) -> dict[str, Any]:
    return {"peak_bytes": series.peak, "seconds": series.seconds, "bytes": series.nbytes}
