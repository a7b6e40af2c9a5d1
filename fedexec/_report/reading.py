"""Files of benchmarks: read and checked, so that whatever is wrong with one has a name."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedexec._report.checking import COUNT, SECONDS, TEXT, check, list_of, load, optional
from fedexec._report.gpu import GpuRun
from fedexec._report.schema import GPU_KEY, KEY, Course, Record
from fedexec.errors import FedexecError

__all__ = ["Measurement", "Run", "UnreadableError", "is_busy", "read"]

LARGEST_FILE = 256 << 20
LEAST_SECONDS = 1e-12
BUSY, OWN = 1.5, 2.0  # load for each core, and what the benchmarks themselves make


class UnreadableError(FedexecError, ValueError):
    """A file that is not one of fedexec's benchmarks; the message names it and says why."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One benchmark: its record and its seconds.

    Attributes
    ----------
    seconds : tuple of float
        Of each round, in the order they were measured; empty where a file does not keep them.
    rounds : int
    """

    name: str
    record: Record
    seconds: tuple[float, ...]
    rounds: int
    median: float
    iqr: float

    @property
    def noise(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        return self.iqr / 2 / self.median if self.median else 0.0

    @property
    def p95(self) -> float | None:
        """Seconds within which 95 % of the rounds were done; None where the file does not keep the rounds."""
        if len(self.seconds) < 2:
            return self.seconds[0] if self.seconds else None
        return statistics.quantiles(self.seconds, n=20, method="inclusive")[-1]


@dataclass(frozen=True, slots=True)
class Run:
    """One file.

    Attributes
    ----------
    label : str
        The file's name; its path, where others have the same name.
    machine : dict
        pytest-benchmark's ``machine_info``.
    course : Course or None
        None where the file does not tell.
    """

    label: str
    when: str
    commit: str | None
    machine: dict[str, Any]
    course: Course | None
    measurements: tuple[Measurement, ...]

    @property
    def unfinished(self) -> list[str]:
        """What was planned and was neither measured nor failed: the run was interrupted."""
        if self.course is None:
            return []
        done = {one.name for one in self.measurements} | set(self.course.failed)
        return [name for name in self.course.planned if name not in done]

    @property
    def machines(self) -> list[str]:
        """The machines that the measurements come from, which should be one."""
        return sorted({f"{one.record.cpu} ({one.record.machine})" for one in self.measurements})

    def busy(self, workload: str) -> str | None:
        """Say that the machine had other work during these rounds, so that their seconds decide nothing."""
        cores = self.machine["cpu"].get("count")
        loads = [one.record.load[0] for one in self.of("round", workload) if one.record.load]
        if not cores or not loads or not is_busy(statistics.median(loads), cores):
            return None
        return (
            f"the machine was not quiet (load {statistics.median(loads):.0f} on {cores} cores): measure again"
        )

    def problems(self) -> list[str]:
        """Say what keeps this from being the whole truth."""
        found = []
        if left := self.unfinished:
            found.append(
                f"{self.label}: the run was interrupted: {len(left)} of "
                f"{len(self.course.planned if self.course else [])} benchmarks are missing"
            )
        for name, error in (self.course.failed if self.course else {}).items():
            found.append(f"{self.label}: {name} failed: {error}")
        if len(self.machines) > 1:
            found.append(f"{self.label}: measured on different machines: {'; '.join(self.machines)}")
        return found

    def of(self, group: str, workload: str | None = None) -> Iterable[Measurement]:
        """Return the measurements of a group, of one workload or of them all."""
        return [
            one
            for one in self.measurements
            if one.record.group == group and (workload is None or one.record.workload == workload)
        ]


def is_busy(load: float, cores: int) -> bool:
    """Whether a load is more than the benchmarks make themselves."""
    return load > BUSY * cores + OWN


def read(path: Path, label: str | None = None) -> Run | GpuRun:
    """Read one file: of `fedexec bench`, or of `make gpu`.

    Parameters
    ----------
    label : str, optional
        What it is called in a report. Default: its name.

    Raises
    ------
    UnreadableError
        It is of another tool, of another schema version, or damaged.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_FILE + 1)  # a device may have no end
        if len(data) > LARGEST_FILE:
            raise ValueError(f"it is larger than {LARGEST_FILE >> 20} MiB")
        content = load(data.decode())
    except OSError as exc:
        raise UnreadableError(f"{path}: {exc.strerror or exc}") from exc
    except UnicodeDecodeError as exc:
        raise UnreadableError(f"{path}: that is no JSON: {exc}") from exc
    except ValueError as exc:
        raise UnreadableError(f"{path}: {exc}") from exc
    if isinstance(content, dict) and GPU_KEY in content:
        try:
            return GpuRun.from_dict(label or path.name, content)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise UnreadableError(f"{path}: {exc}; was it written by `make gpu`?") from exc
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise UnreadableError(f"{path}: that was not written by `fedexec bench` or by pytest-benchmark")
    try:
        course = Course.from_dict(content[KEY]) if KEY in content else None
        measured = tuple(_measurement(one) for one in content["benchmarks"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UnreadableError(f"{path}: {exc}; was it written by `fedexec bench`?") from exc
    commit, machine = _dict(content, "commit_info").get("id"), _dict(content, "machine_info")
    machine["cpu"] = _dict(machine, "cpu")
    if not COUNT.holds(machine["cpu"].get("count")):
        machine["cpu"]["count"] = None
    commit = commit if isinstance(commit, str) else None
    return Run(label or path.name, str(content.get("datetime") or ""), commit, machine, course, measured)


def _dict(content: dict[str, Any], name: str) -> dict[str, Any]:
    """Return what describes a run, which no figure depends on; what is none is taken for nothing."""
    found = content.get(name)
    return dict(found) if isinstance(found, dict) else {}


def _measurement(benchmark: dict[str, Any]) -> Measurement:
    name, stats = str(benchmark["name"]), benchmark["stats"]
    try:
        check(benchmark, {"name": TEXT})
        record = Record.from_dict(benchmark["extra_info"].get(KEY))
        check(stats, _STATS, "stats")
    except ValueError as exc:
        raise ValueError(f"benchmark {name}: {exc}") from exc
    seconds = tuple(float(second) for second in stats.get("data") or ())
    rounds = int(stats.get("rounds", len(seconds)))
    median, iqr = float(stats["median"]), float(stats["iqr"])
    if not all(value >= LEAST_SECONDS for value in (median, *seconds)):
        raise ValueError(f"benchmark {name}: its seconds are no seconds")
    return Measurement(name, record, seconds, rounds, median, iqr)


_STATS = {"data": optional(list_of(SECONDS)), "rounds": COUNT, "median": SECONDS, "iqr": SECONDS}
