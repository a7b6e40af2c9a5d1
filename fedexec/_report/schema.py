"""What a benchmark records: `fedexec._bench` writes it, this package reads it, and nobody else knows.

A file is pytest-benchmark's JSON. Each of its benchmarks carries a :class:`Record` as
``extra_info["fedexec"]``, and the file a :class:`Course` as ``"fedexec"``: what was planned, and what became
of it. What was not measured is None everywhere.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, TypeVar

from fedexec._report.checking import (
    AMOUNT,
    COUNT,
    FLAG,
    NUMBER,
    SECONDS,
    TEXT,
    TEXTS,
    Kind,
    check,
    list_of,
    mapping_of,
    optional,
)

__all__ = [
    "FRESH",
    "GPU_KEY",
    "GROUPS",
    "ISOLATIONS",
    "KEY",
    "PHASES",
    "REUSED",
    "SCHEMA",
    "THREAD",
    "VARIES",
    "Course",
    "Record",
    "name_of",
    "parts_of",
]

SCHEMA = 1
"""Changes when a file of before cannot be read any more."""

KEY = "fedexec"
GPU_KEY = "fedexec-gpu"  # the schema stands under it in what `make gpu` writes
GROUPS = ("start-up", "overhead", "transport", "round", "footprint", "scaling", "faults")
PHASES = ("start", "import", "transfer", "compute", "exit")
VARIES = "varies"  # instead of a digest
FRESH, REUSED, THREAD = "fresh process", "reused process", "none"
ISOLATIONS = (FRESH, REUSED, THREAD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one benchmark measured beside its seconds.

    Attributes
    ----------
    group : str
        One of GROUPS.
    strategy : str
        Name of a backend, or of a peer.
    isolation : str
        One of ISOLATIONS: what a client runs in.
    peer : bool
        Not one of fedexec's backends.
    variant : str or None
        What tells benchmarks of one group and strategy apart, such as "cold".
    workload : str or None
        What a client computes; None where it computes nothing.
    prepared : str
        What workers have imported before: start-up holds for jobs of the same preparation.
    clients, workers : int
        How many clients a round has, and how many of them run at once.
    compute_seconds : float or None
        Median time that a client computes, measured inside its worker, without its imports.
    import_seconds : float or None
        Median time that a client's task spends on imports.
    phases : dict of str to float, or None
        PHASES of one client alone, median seconds.
    memory : dict or None
        ``timeline`` as :meth:`fedexec.memory.timeline.Timeline.as_dict` gives it, and of it
        ``host_peak_bytes``, ``device`` (its name), ``device_total_bytes``, ``device_peak_bytes``,
        ``device_residual_bytes`` (the most after a round) and ``device_end_bytes`` (after shutdown).
    emulated : str or None
        How the device is emulated, if it is.
    digest : str or None
        SHA-256 of what the clients returned; "varies" if two rounds of this strategy differ.
    faults : dict or None
        One client's worker is killed: ``survived`` of its ``others``, and whether the executor is ``usable``.
    tasks, out_of_memory : int or None
        How many clients ran, and how many of them did not fit into memory.
    versions, settings : dict
    cpu, machine : str
        The processor, and a fingerprint of the machine.
    load : list of float or None
        Load averages before the benchmark began.
    """

    group: str
    strategy: str
    isolation: str
    peer: bool = False
    variant: str | None = None
    workload: str | None = None
    prepared: str = ""
    clients: int = 1
    workers: int = 1
    compute_seconds: float | None = None
    import_seconds: float | None = None
    phases: Mapping[str, float] | None = None
    memory: Mapping[str, Any] | None = None
    emulated: str | None = None
    digest: str | None = None
    faults: Mapping[str, Any] | None = None
    tasks: int | None = None
    out_of_memory: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    cpu: str = ""
    machine: str = ""
    load: list[float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON knows it."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Any) -> "Record":
        """Read what :meth:`as_dict` wrote.

        Raises
        ------
        ValueError
            It is of another schema, or not what it should be; says what is wrong.
        """
        made = _read(cls, content, {"group": GROUPS, "isolation": ISOLATIONS})
        _has("phases", made.phases, *PHASES)
        _has("faults", made.faults, *_FAULTS)
        _has("memory", made.memory, "host_peak_bytes", "device_peak_bytes", "device_residual_bytes")
        timeline = (made.memory or {}).get("timeline")
        _has("timeline", timeline, "host", "devices", "marks")
        check(content, _RECORD)
        check(made.faults or {}, _FAULTS, "faults")
        check(made.memory or {}, _MEMORY, "memory")
        if timeline is not None:
            _check_timeline(timeline)
        if min(made.clients, made.workers) < 1:
            raise ValueError(f"{made.clients} clients, {made.workers} workers")
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What was to be measured in a run, and what became of it.

    Attributes
    ----------
    mode : str
        "quick", "full" or "smoke".
    planned : list of str
        Names of benchmarks.
    failed : dict of str to str
        Name of a benchmark to its error.
    missing : dict of str to str
        Strategies that cannot run here, and why.
    inputs : dict of str to str
        What the figures depend on beside the machine: a run that was interrupted goes on with the same only.
    """

    mode: str
    planned: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return this as JSON knows it."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Any) -> "Course":
        """Read what :meth:`as_dict` wrote; see :meth:`Record.from_dict`."""
        made = _read(cls, content, {})
        check(content, {"mode": TEXT, "planned": list_of(TEXT), **dict.fromkeys(_OF_NAMES, TEXTS)})
        return made


def name_of(group: str, strategy: str, *rest: str) -> str:
    """Return a benchmark's name, the one that pytest gives the test: ``test_start_up[standby/cold]``."""
    return f"test_{group.replace('-', '_')}[{'/'.join((strategy, *rest))}]"


def parts_of(name: str) -> tuple[str, str, list[str]]:
    """Take a benchmark's name apart: group, strategy, and the rest."""
    group, _, parts = name.removesuffix("]").removeprefix("test_").partition("[")
    strategy, *rest = parts.split("/")
    return group.replace("_", "-"), strategy, rest


def _has(what: str, found: object, *keys: str) -> None:
    if found is not None and not (isinstance(found, dict) and all(key in found for key in keys)):
        raise ValueError(f"not whole: {what}")


_OF_NAMES = ("failed", "missing", "inputs")
_FAULTS = {"survived": COUNT, "others": COUNT, "usable": FLAG}
_RECORD = {
    **dict.fromkeys(("group", "strategy", "isolation", "prepared", "cpu", "machine"), TEXT),
    **dict.fromkeys(("variant", "workload", "emulated", "digest"), optional(TEXT)),
    **dict.fromkeys(("compute_seconds", "import_seconds"), optional(SECONDS)),
    **dict.fromkeys(("tasks", "out_of_memory"), optional(COUNT)),
    "clients": COUNT,
    "workers": COUNT,
    "peer": FLAG,
    "phases": optional(mapping_of(SECONDS)),
    "versions": TEXTS,
    "settings": Kind("mapping", lambda value: isinstance(value, dict)),
    "load": optional(list_of(NUMBER)),
}
_MEMORY = {
    "host_peak_bytes": optional(AMOUNT),
    "device": optional(TEXT),
    **{f"device_{name}_bytes": optional(AMOUNT) for name in ("total", "peak", "residual", "end")},
}
_MARK = {
    "seconds": SECONDS,
    "label": TEXT,
    "server_round": optional(COUNT),
    "host_bytes": optional(AMOUNT),
    "device_bytes": mapping_of(optional(AMOUNT)),
}


def _check_timeline(found: Mapping[str, Any]) -> None:
    """Hold what was measured one after the other to what can be drawn."""
    place = "memory.timeline"
    check(found, {"devices": Kind("mapping", lambda value: isinstance(value, dict))}, place)
    check(found, {"marks": Kind("list", lambda value: isinstance(value, list))}, place)
    series = {"host": found["host"], **{f"devices.{name}": one for name, one in found["devices"].items()}}
    for name, one in series.items():
        _has(f"{place}.{name}", one if one is not None else 0, "seconds", "bytes")
        check(one, {"seconds": list_of(SECONDS), "bytes": list_of(AMOUNT)}, f"{place}.{name}")
        if len(one["seconds"]) != len(one["bytes"]) or one["seconds"] != sorted(one["seconds"]):
            raise ValueError(f"not whole: {place}.{name}")
    for index, mark in enumerate(found["marks"]):
        _has(f"{place}.marks[{index}]", mark if mark is not None else 0, *_MARK)
        check(mark, _MARK, f"{place}.marks[{index}]")


_T = TypeVar("_T", Record, Course)


def _read(cls: type[_T], content: object, choices: Mapping[str, tuple[str, ...]]) -> _T:
    if not isinstance(content, dict):
        raise ValueError("what fedexec records is not there")
    schema = content.get("schema")
    if schema != SCHEMA:
        raise ValueError(f"it is of schema {schema}; this fedexec reads schema {SCHEMA}")
    known = {one.name for one in fields(cls)}
    try:
        made = cls(**{name: value for name, value in content.items() if name in known})
    except TypeError as exc:
        raise ValueError(f"what fedexec records is not whole: {exc}") from exc
    for name, allowed in choices.items():
        if getattr(made, name) not in allowed:
            raise ValueError(f"unknown {name} {getattr(made, name)!r}")
    return made
