"""Records over time how much memory is held: on the host by this program, on each device by all programs.

A :class:`Timeline` measures repeatedly while it is open. *Marks* are measurements at important moments, such
as the end of a round. Which task held the memory follows from the futures: ``usage``, ``started`` and
``ended``.

Memory that a mark finds beyond the baseline is a *residual*: it outlived the work for which it was allocated.
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

DEVICE_SECONDS = 0.05  # time between two measurements of devices; each takes some microseconds
HOST_SECONDS = 1.0  # shortest time between two measurements of the host
HOST_SHARE = 0.01  # largest share of time spent on measuring the host, which delays the processes
MOST_POINTS = 2048  # of a series


@dataclass(slots=True)
class Series:
    """Measurements over time, at most 2048 points. Beyond that, two neighbouring points become one.

    Attributes
    ----------
    seconds : list of float
        Times in seconds since the timeline began.
    nbytes : list of int
        Measured bytes; for two points that became one, the larger value.
    peak : int or None
        The largest value in bytes; None if nothing was measured.
    """

    seconds: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    _step: float = 0.0  # seconds that each point stands for

    @property
    def peak(self) -> int | None:
        """Return the largest value."""
        return max(self.nbytes, default=None)

    def add(self, seconds: float, nbytes: int | None) -> None:
        """Add a point.

        Parameters
        ----------
        seconds : float
            Time in seconds since the timeline began.
        nbytes : int or None
            Measured bytes; None adds no point.
        """
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
    """What was held at one moment. A value that was not measured is None.

    Attributes
    ----------
    seconds : float
        Time in seconds since the timeline began.
    label : str
        "round", "shutdown", or a label of the caller.
    server_round : int or None
        Number of the round.
    host_bytes : int or None
        PSS of this process and all its descendants.
    device_bytes : dict of str to (int or None)
        Bytes held beyond the baseline, by UUID of the device.
    """

    seconds: float
    label: str
    server_round: int | None
    host_bytes: int | None
    device_bytes: dict[str, int | None]


class Timeline:
    """Measures memory from its creation until :meth:`close`; a context manager.

    Parameters
    ----------
    devices : sequence of Device
        Usually ``executor.devices``.

    Attributes
    ----------
    began : float
        Start in seconds since the epoch.
    watched : tuple of Device
        The devices that are measured.
    host : Series
        PSS of this process and all its descendants, measured at most once a second.
    devices : dict of str to Series
        Bytes held beyond the baseline, by UUID of the device, measured 20 times a second.
    baseline : dict of str to (int or None)
        Bytes that were held at the start, by UUID of the device. If it is None, nothing is measured on that
        device.
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
        self._lock = threading.Lock()  # guards the measurements
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
        """Measure now, and keep the result. This takes milliseconds for each process.

        Parameters
        ----------
        label : str
            The reason for the mark, such as "round".
        server_round : int, optional
            Number of the round.

        Returns
        -------
        Mark
        """
        mark = Mark(self._now(), label, server_round, host.tree_bytes(), self._held())
        with self._lock:
            self.marks.append(mark)
            self.host.add(mark.seconds, mark.host_bytes)
            self._add_held(mark.seconds, mark.device_bytes)
        return mark

    def residual_bytes(self, uuid: str, label: str) -> int | None:
        """Return the largest residual that the marks of one label have found on a device.

        Parameters
        ----------
        uuid : str
            UUID of the device.
        label : str

        Returns
        -------
        int or None
            Bytes; None if one of the marks could not measure the device, or if there is no such mark.
        """
        with self._lock:
            residuals = [mark.device_bytes[uuid] for mark in self.marks if mark.label == label]
        measured = [residual for residual in residuals if residual is not None]
        return max(measured, default=None) if len(measured) == len(residuals) else None

    def as_dict(self) -> dict[str, Any]:
        """Return all measurements as a dictionary that :mod:`json` can write."""
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
