"""One row for each strategy and workload, gathered from the groups of a run."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fedexec._report import numbers
from fedexec._report.reading import Measurement, Run
from fedexec._report.schema import FRESH, THREAD, VARIES, Record, parts_of

__all__ = ["Row", "rows", "workloads"]

IN_PROCESS = "inline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a strategy did with a workload. What was not measured is None.

    Attributes
    ----------
    clients_per_second, round_median, round_p95 : float or None
    cold, warm : float or None
        Seconds until a new executor has the result of its first task, and one that stands that of another.
    overhead : float or None
        Share of the round's time beyond what the same clients take in the caller's own process.
    device_peak, device_residual, device_end, host_peak : int or None
        Bytes; see :class:`fedexec._report.schema.Record`.
    host_residual : int or None
        The most bytes that the caller and its workers held of the host after a round.
    emulated : str or None
        How the device was emulated.
    contained : bool or None
        Whether a worker that dies hurts no other client and the executor goes on.
    survived : str or None
        How many of the other clients finish, when a worker dies.
    survived_all : bool or None
        Whether all of them did.
    equal : bool or None
        Whether the clients returned what they return in the caller's own process, to the bit.
    varies : bool
        They return something else each time in the caller's own process, too.
    n : int
        Rounds.
    noise : float
        Of a round's median; see :attr:`fedexec._report.reading.Measurement.noise`.
    failed : str or None
        What of it could not be measured, and why.
    eligible : bool
        Whether the verdict might recommend it.
    reason : str
        Why the verdict does, or does not; empty where there is no verdict.
    """

    strategy: str
    isolation: str
    peer: bool = False
    workers: int = 1
    clients: int = 1
    clients_per_second: float | None = None
    round_median: float | None = None
    round_p95: float | None = None
    cold: float | None = None
    warm: float | None = None
    overhead: float | None = None
    device_peak: int | None = None
    device_residual: int | None = None
    device_end: int | None = None
    host_peak: int | None = None
    host_residual: int | None = None
    emulated: str | None = None
    contained: bool | None = None
    survived: str | None = None
    survived_all: bool | None = None
    equal: bool | None = None
    varies: bool = False
    n: int = 0
    noise: float = 0.0
    compute: float | None = None
    imports: float | None = None
    out_of_memory: int = 0
    tasks: int = 0
    failed: str | None = None
    eligible: bool = False
    reason: str = ""

    @property
    def gives_back(self) -> bool:
        """Whether nothing of a client outlives it: as measured on the device, else by what it runs in."""
        if self.device_residual is not None:
            return self.device_residual == 0 and self.isolation == FRESH
        return self.isolation == FRESH

    @property
    def conditions(self) -> str:
        """What the figures hold for."""
        return f"{numbers.count(self.clients, 'client')} a round, {self.workers} at once"

    @property
    def isolated(self) -> bool:
        """Whether a client runs in another process than its caller."""
        return self.isolation != THREAD

    def as_dict(self) -> dict[str, Any]:
        """Return the row as JSON knows it."""
        return asdict(self)


def workloads(run: Run) -> list[str]:
    """Return what was computed in rounds, in the order of the run; last what failed everywhere."""
    measured = [one.record.workload for one in run.of("round") if one.record.workload]
    failed = [rest[0] for group, _, rest, _ in _failed_parts(run) if group == "round" and rest]
    return list(dict.fromkeys(measured + failed))


def rows(run: Run, workload: str) -> list[Row]:
    """Gather the table of one workload, the fastest first, what failed last."""
    measured = {one.record.strategy: one for one in run.of("round", workload)}
    baseline = measured.get(IN_PROCESS)
    table = [_row(run, workload, one, baseline) for one in measured.values()]
    table += [_failed(run, strategy, error) for strategy, error in _failures(run, workload, measured).items()]
    return sorted(table, key=lambda row: (row.failed is not None, row.round_median or 0.0))


def _row(run: Run, workload: str, one: Measurement, baseline: Measurement | None) -> Row:
    record = one.record
    memory_of = _last(run.of("footprint", workload), record.strategy)
    memory = (memory_of.record.memory if memory_of else None) or {}
    faults = _last(run.of("faults"), record.strategy)
    found = dict(faults.record.faults or {}) if faults else {}
    cold, warm = (_start(run, record, variant) for variant in ("cold", "warm"))
    expected = baseline.record.digest if baseline else None
    passes = [record, *([memory_of.record] if memory_of else [])]
    return Row(
        strategy=record.strategy,
        isolation=record.isolation,
        peer=record.peer,
        workers=record.workers,
        clients=record.clients,
        clients_per_second=record.clients / one.median if one.median else None,
        round_median=one.median,
        round_p95=one.p95,
        cold=cold,
        warm=warm,
        overhead=one.median / baseline.median - 1 if baseline else None,
        device_peak=memory.get("device_peak_bytes"),
        device_residual=memory.get("device_residual_bytes"),
        device_end=memory.get("device_end_bytes"),
        host_peak=memory.get("host_peak_bytes"),
        host_residual=_host_residual(memory),
        emulated=memory_of.record.emulated if memory_of else None,
        contained=_contains(record.isolation, found),
        survived=f"{found['survived']} of {found['others']}" if found else None,
        survived_all=found["survived"] == found["others"] if found else None,
        equal=_same(record.digest, expected),
        varies=record.digest == VARIES and expected in (VARIES, None),
        n=one.rounds,
        noise=one.noise,
        compute=record.compute_seconds,
        imports=record.import_seconds,
        out_of_memory=sum(each.out_of_memory or 0 for each in passes),
        tasks=sum(each.tasks or 0 for each in passes),
        failed=_error(run, record.strategy, workload),
    )


def _host_residual(memory: Mapping[str, Any]) -> int | None:
    marks = (memory.get("timeline") or {}).get("marks") or ()
    held = [each["host_bytes"] for each in marks if each["label"] == "round"]
    return max((nbytes for nbytes in held if nbytes is not None), default=None)


def _contains(isolation: str, found: Mapping[str, Any]) -> bool | None:
    """Without isolation nobody is asked: who kills its own process kills all."""
    if isolation == THREAD:
        return False
    return bool(found["survived"] == found["others"] and found["usable"]) if found else None


def _start(run: Run, record: Record, variant: str) -> float | None:
    found = [
        one
        for one in run.of("start-up")
        if (one.record.variant, one.record.prepared) == (variant, record.prepared)
    ]
    one = _last(found, record.strategy)
    return one.median if one else None


def _last(found: Iterable[Measurement], strategy: str) -> Measurement | None:
    return next((one for one in reversed(list(found)) if one.record.strategy == strategy), None)


def _same(digest: str | None, expected: str | None) -> bool | None:
    return None if digest is None or expected in (None, VARIES) else digest == expected


def _failed_parts(run: Run) -> list[tuple[str, str, list[str], str]]:
    """Return group, strategy, the rest of the name, and the error of what failed."""
    return [(*parts_of(name), error) for name, error in (run.course.failed if run.course else {}).items()]


def _error(run: Run, strategy: str, workload: str) -> str | None:
    """Return the first thing that failed for a strategy, of what this workload is judged by."""
    judged_by: tuple[tuple[str, list[str]], ...]
    judged_by = (("round", [workload]), ("footprint", [workload]), ("faults", []))
    for group, name, rest, error in _failed_parts(run):
        if name == strategy and (group, rest) in judged_by:
            return f"{group}: {error}"
    return None


def _failures(run: Run, workload: str, measured: dict[str, Measurement]) -> dict[str, str]:
    """Return the strategies whose round of that workload failed, and why."""
    return {
        strategy: f"{group}: {error}"
        for group, strategy, rest, error in _failed_parts(run)
        if group == "round" and rest == [workload] and strategy not in measured
    }


def _failed(run: Run, strategy: str, error: str) -> Row:
    known = next((one.record for one in run.measurements if one.record.strategy == strategy), None)
    return Row(
        strategy=strategy,
        isolation=known.isolation if known else "unknown",
        peer=known.peer if known else False,
        failed=error,
    )
