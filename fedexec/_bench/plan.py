"""What is measured: a list of parts, each of them one benchmark of the file."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from fedexec._bench.peers import COPY, FORK, TUTORIAL, Contestant, contestants
from fedexec._bench.workloads import BUILT_IN, OwnTask
from fedexec._report.schema import THREAD, name_of
from fedexec._system.available_resources import available_cores

__all__ = ["MODES", "Part", "State", "missing", "plan"]

State = dict[str, Any]
"""How far the measurement of a part is: ``seconds`` of each round, and what its session has ``noted``."""

MODES = ("smoke", "quick", "full")
WORKERS = 2
SMOKE_ONLY = {"cnn-short": ("standby", "inline"), "resnet18": ("standby",)}  # torch takes long to import


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One benchmark.

    Attributes
    ----------
    group, strategy, workload : str
        The job is what workers are prepared for, also where the task does nothing.
    variant : str or None
        Which of a group's measurements.
    clients, workers : int
    rounds, warmup_rounds : int
    own : OwnTask or None
        The user's function.
    """

    group: str
    strategy: str
    workload: str
    variant: str | None = None
    clients: int = 1
    workers: int = 1
    rounds: int = 1
    warmup_rounds: int = 0
    own: OwnTask | None = None

    @property
    def computes(self) -> bool:
        """Whether the job is what is measured."""
        return self.group in ("round", "footprint", "scaling")

    @property
    def name(self) -> str:
        """The benchmark's name in the file."""
        rest = [self.workload] if self.computes or self.group == "start-up" else []
        if self.group == "scaling":
            rest.append(f"{self.variant}-{getattr(self, self.variant or '')}")
        elif self.variant:
            rest.append(self.variant)
        return name_of(self.group, self.strategy, *rest)

    def as_dict(self) -> dict[str, Any]:
        """Return the part as JSON knows it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Part":
        """Read what :meth:`as_dict` wrote."""
        own = content.get("own")
        return replace(cls(**(content | {"own": None})), own=OwnTask(**own) if own else None)


def missing(mode: str, only: Sequence[str] = ()) -> dict[str, str]:
    """Return who does not take part, and why."""
    found = {one.name: one.missing for one in contestants().values() if one.missing}
    if mode != "full":
        peers = [one.name for one in contestants().values() if one.peer and one.name not in (FORK, COPY)]
        found |= {name: "only with --full" for name in peers if name not in found}
    if only:
        found |= {name: "left out by --only" for name in contestants() if name not in (*only, FORK, COPY)}
    return {name: why for name, why in found.items() if why}


def plan(mode: str, own: OwnTask | None = None, only: Sequence[str] = ()) -> list[Part]:
    """Return the parts of a mode, those that a verdict needs first.

    Parameters
    ----------
    mode : {"smoke", "quick", "full"}
    own : OwnTask, optional
        Measure this function instead of our jobs.
    only : sequence of str, optional
        Who takes part. Default: everybody.
    """
    absent = missing(mode, only)
    able = [one for one in contestants().values() if one.name not in absent and one.name not in (FORK, COPY)]
    names = [own.task] if own else [name for name, job in BUILT_IN.items() if job.missing is None]
    sizes = _SIZES[mode]
    light = names[0] if own or mode == "full" else "numpy"  # what workers are prepared for to do nothing
    parts = [
        *(part for name in names for part in _rounds(sizes, _who(able, name, mode, names), name, own)),
        *(part for name in _prepared(mode, names) for part in _starts(sizes, able, name, own)),
        *_faults(able, light, own),
    ]
    if own is None and mode != "quick":
        parts += _extras(mode, sizes, able, light)
    parts += _scaling(sizes, [one for one in able if not one.slow], names, own)
    if mode != "smoke":
        return parts
    heavy = [part for part in parts if part.computes and part.workload in SMOKE_ONLY]
    parts = [part for part in parts if part not in heavy or part.strategy in SMOKE_ONLY[part.workload]]
    return [replace(part, rounds=1, warmup_rounds=0) for part in parts]


def _prepared(mode: str, names: Sequence[str]) -> list[str]:
    """Return the jobs whose preparation is timed: one that imports torch, and one that does not."""
    return ["numpy"] if mode == "smoke" and "numpy" in names else list(dict.fromkeys((names[0], names[-1])))


def _who(able: Sequence[Contestant], name: str, mode: str, names: Sequence[str]) -> list[Contestant]:
    """Return who computes a job; who needs seconds for any client needs them with torch and without."""
    told = _prepared(mode, names)
    return [one for one in able if not one.slow or one.name == TUTORIAL or name in told]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """How much of everything: clients a round of each job (0: not at all), and rounds."""

    clients: dict[str, int]
    own_clients: int
    rounds: int
    footprint: tuple[str, ...]
    memory: int
    cold: int
    warm: int
    burst: int
    transport: int
    scaling_by: str
    workers: tuple[int, ...]
    more_clients: tuple[int, ...]


_SIZES = {
    "smoke": _Sizes(
        clients={"cnn": 0, "cnn-short": 2, "resnet18": 2, "numpy": 2}, own_clients=2, rounds=1,
        footprint=("cnn-short", "numpy"), memory=1, cold=1, warm=1, burst=1, transport=1, scaling_by="numpy",
        workers=(1, 2), more_clients=(10,),
    ),
    "quick": _Sizes(
        clients={"cnn": 4, "cnn-short": 0, "resnet18": 0, "numpy": 10}, own_clients=4, rounds=5,
        footprint=("cnn",), memory=1, cold=1, warm=5, burst=0, transport=0, scaling_by="numpy",
        workers=(), more_clients=(),
    ),
    "full": _Sizes(
        clients={"cnn": 10, "cnn-short": 10, "resnet18": 10, "numpy": 10}, own_clients=10, rounds=9,
        footprint=("cnn", "resnet18", "numpy"), memory=3, cold=3, warm=40, burst=9, transport=9,
        scaling_by="cnn-short", workers=(1, 2, 4), more_clients=(10, 100, 1000),
    ),
}  # fmt: skip


def _rounds(sizes: _Sizes, able: Sequence[Contestant], name: str, own: OwnTask | None) -> Iterator[Part]:
    """Yield rounds and footprints of a job: what is compared is measured together."""
    clients = sizes.own_clients if own else sizes.clients[name]
    if not clients:
        return
    common: dict[str, Any] = {"workload": name, "clients": clients, "workers": WORKERS, "own": own}
    for one in able:
        rounds = min(3, sizes.rounds) if one.slow else sizes.rounds  # warmed up by the clients alone
        yield Part(group="round", strategy=one.name, rounds=rounds, **common)
    for one in able:
        if own or name in sizes.footprint:
            rounds = 1 if one.slow else sizes.memory
            yield Part(group="footprint", strategy=one.name, rounds=rounds, **common)


def _starts(sizes: _Sizes, able: Sequence[Contestant], name: str, own: OwnTask | None) -> Iterator[Part]:
    common: dict[str, Any] = {"group": "start-up", "workload": name, "own": own}
    for one in able:
        yield Part(strategy=one.name, variant="cold", rounds=sizes.cold, **common)
    for one in able:
        rounds = 3 if one.slow else sizes.warm
        yield Part(strategy=one.name, variant="warm", rounds=rounds, warmup_rounds=1, **common)


def _faults(able: Sequence[Contestant], name: str, own: OwnTask | None) -> Iterator[Part]:
    for one in able:
        if one.isolation != THREAD:
            yield Part(group="faults", strategy=one.name, workload=name, clients=4, workers=WORKERS, own=own)


def _extras(mode: str, sizes: _Sizes, able: Sequence[Contestant], first: str) -> Iterator[Part]:
    """Yield what tells a job's costs apart, which no verdict needs."""
    quick = [one.name for one in able if not one.slow]
    if mode == "full":
        quick.append(FORK)
        yield Part(group="start-up", strategy=FORK, variant="warm", workload=first, rounds=sizes.warm)
    for name in quick:
        yield Part(
            group="overhead", strategy=name, workload=first, clients=20, rounds=sizes.burst, warmup_rounds=1
        )
    sharing = [one for one in able if one.isolation != THREAD]
    for one in sharing:
        rounds = min(3, sizes.transport) if one.slow else sizes.transport
        yield Part(
            group="transport", strategy=one.name, variant="there-and-back", workload=first, rounds=rounds,
            warmup_rounds=1,
        )  # fmt: skip
    yield Part(
        group="transport", strategy=COPY, variant="there-and-back", workload=first, rounds=sizes.transport,
        warmup_rounds=1,
    )  # fmt: skip
    standby = any(one.name == "standby" for one in able)
    for clients in (1, 8) if mode == "full" and standby else ():
        yield Part(
            group="transport", strategy="standby", variant=f"{clients}-readers", workload=first,
            clients=clients, workers=WORKERS, rounds=15, warmup_rounds=1,
        )  # fmt: skip


def _scaling(
    sizes: _Sizes, able: Sequence[Contestant], names: Sequence[str], own: OwnTask | None
) -> Iterator[Part]:
    name = own.task if own else sizes.scaling_by if sizes.scaling_by in names else names[-1]
    clients = sizes.own_clients if own else max(2, sizes.clients[name])
    for one in able:
        common: dict[str, Any] = {"strategy": one.name, "workload": name, "own": own, "group": "scaling"}
        for workers in sorted({*sizes.workers, *((available_cores(),) if len(sizes.workers) > 2 else ())}):
            yield Part(
                variant="workers", clients=clients, workers=workers, rounds=3, warmup_rounds=1, **common
            )
        for more in sizes.more_clients if own is None else ():
            yield Part(
                variant="clients", clients=more, workers=WORKERS, rounds=3 if more < 1000 else 1,
                warmup_rounds=1 if more < 1000 else 0, **common,
            )  # fmt: skip
