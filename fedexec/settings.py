"""What an executor was told to do, and by whom: argument > flag > environment > config > default.

Every field of :class:`Settings` can be given in the environment as ``FEDEXEC_`` and its name in capitals.
"""

import difflib
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedexec.errors import SettingsError
from fedexec.machine import available_cores
from fedexec.visible import visible

__all__ = ["Settings", "format_size", "parse_size", "resolve", "setting_names", "unknown_variables"]

log = logging.getLogger("fedexec")

FORK_IS_SAFE = sys.platform == "linux"  # macOS's own libraries start threads
DEFAULT_BACKEND = "standby" if FORK_IS_SAFE else "process"
AUTO = "auto"
PREFIX = "FEDEXEC_"
START_METHODS = ("forkserver", "spawn")

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The resolved settings of one executor.

    Attributes
    ----------
    backend : str
        Name of the backend.
    max_workers : int
        How many tasks run at once; where `auto`, at most.
    auto : bool
        ``max_workers="auto"``: as many run at once as memory allows.
    start_method : {"forkserver", "spawn"}
        How worker processes start.
    preload : tuple of str
        Modules a worker has imported before its first task.
    timeout : float or None
        Seconds a task may take from the moment it is handed to the backend; None is for ever.
    retries : int
        How often a task is run again when its worker died under it.
    memory_limit, device_memory_limit : int or None
        Bytes of the host's memory and of a device's; a reused worker that holds more after a task is
        replaced.
    enforce_limits : bool
        Whether a task that exceeds one of them while it *runs* is ended.
    device : str or None
        Which devices tasks compute on, as :func:`fedexec.memory.device.devices` reads it.
    threads_per_worker : int
        Given to OpenMP, MKL and OpenBLAS in each worker.
    max_tasks_per_child : int
        How many tasks a worker of ``standby`` runs before it ends.
    standby : int
        How many workers wait ahead of need.
    shared_memory : bool
        Whether large arrays go through shared memory.
    preload_timeout : float
        Seconds that the preload and the warm-up may take.
    log_level : str or None
        Level of the ``fedexec`` logger; None leaves it to the application.
    learn : bool
        Whether later workers are born with the modules that tasks have imported.
    seed : int or None
        What each task's random numbers follow from, with its number; None leaves them to the system.
    sources : mapping of str to str
        Field name to who set it: "argument", "flag", the environment variable, "config" or "default".
    """

    backend: str = DEFAULT_BACKEND
    max_workers: int = 1
    auto: bool = False
    start_method: str = "forkserver" if FORK_IS_SAFE else "spawn"
    preload: tuple[str, ...] = ()
    timeout: float | None = None
    retries: int = 0
    memory_limit: int | None = None
    device_memory_limit: int | None = None
    enforce_limits: bool = False
    device: str | None = None
    threads_per_worker: int = 1
    max_tasks_per_child: int = 1
    standby: int = 1
    shared_memory: bool = True
    preload_timeout: float = 120.0
    log_level: str | None = None
    learn: bool = True
    seed: int | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON knows them."""
        return asdict(self)

    def __str__(self) -> str:
        shown: tuple[str, ...] = (
            "backend",
            "max_workers",
            "start_method",
            "timeout",
            "memory_limit",
            "threads_per_worker",
        )
        shown += ("device",) if self.device else ()
        return ", ".join(
            f"{name}={getattr(self, name)} ({self.sources.get(name, 'default')})" for name in shown
        )


def parse_size(text: str | int) -> int:
    """Read a number of bytes as people write it.

    Parameters
    ----------
    text : str or int
        ``"512MiB"``, ``"1.5 GB"``, ``"800m"`` or plain bytes. KiB, MiB, GiB, TiB are powers of 1024; KB,
        MB, GB, TB (and one letter) powers of 1000.

    Returns
    -------
    int
        Bytes, more than 0.

    Raises
    ------
    SettingsError
        Not a size.
    """
    match = _SIZE.fullmatch(str(text)) if not isinstance(text, bool) else None
    if match is None or (match[2] and match[2].lower() not in _UNITS):
        raise SettingsError(f"{text!r} is not a size. Write it like 512MiB, 1.5GB or a number of bytes")
    size = int(float(match[1]) * _UNITS[match[2].lower()])
    if size <= 0:
        raise SettingsError(f"a size must be greater than 0, got {text!r}")
    return size


def format_size(size: int | None) -> str:
    """Write a number of bytes for people; None, which was not measured, says so."""
    if size is None:
        return "not measured"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def _whole(minimum: int, complaint: str) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError
        except (ValueError, TypeError):
            raise SettingsError(f"must be a whole number, got {value!r}") from None
        if number < minimum:
            raise SettingsError(f"{complaint}, got {number}")
        return number

    return read


_at_least_one = _whole(1, "must be greater than 0")


def _workers(value: Any) -> int | str:
    return AUTO if value == AUTO else _at_least_one(value)


def _device(value: Any) -> str:
    if not isinstance(value, str):
        raise SettingsError(f"must be text, got {value!r}")
    return value.strip()


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (ValueError, TypeError):
        raise SettingsError(f"must be a number of seconds, got {value!r}") from None
    if not 0 < seconds < float("inf"):
        raise SettingsError(f"must be greater than 0 seconds, got {value!r}")
    return seconds


def _modules(value: str | Iterable[str]) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    return tuple(name.strip() for name in names if name.strip())


def _start_method(value: Any) -> str:
    if value not in START_METHODS:
        raise SettingsError(f"must be one of {', '.join(START_METHODS)}, got {value!r}")
    return str(value)


def _log_level(value: Any) -> str:
    level = str(value).upper()
    if level not in logging.getLevelNamesMapping():
        raise SettingsError(f"must be DEBUG, INFO, WARNING or ERROR, got {value!r}")
    return level


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    try:
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
    except (AttributeError, KeyError):
        raise SettingsError(f"must be true or false, got {value!r}") from None


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"must be the name of a backend, got {value!r}")
    return value.strip()


_READERS: dict[str, Callable[[Any], Any]] = {
    "backend": _name,
    "max_workers": _workers,
    "start_method": _start_method,
    "preload": _modules,
    "timeout": _seconds,
    "retries": _whole(0, "must not be negative"),
    "memory_limit": parse_size,
    "device_memory_limit": parse_size,
    "enforce_limits": _switch,
    "device": _device,
    "threads_per_worker": _at_least_one,
    "max_tasks_per_child": _at_least_one,
    "standby": _whole(0, "must not be negative"),
    "shared_memory": _switch,
    "preload_timeout": _seconds,
    "log_level": _log_level,
    "learn": _switch,
    "seed": _whole(0, "must not be negative"),
}


def setting_names() -> tuple[str, ...]:
    """Return the name of every setting."""
    return tuple(_READERS)


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Find variables that look like ours and are no setting: they may be misspelt.

    Parameters
    ----------
    environ : mapping of str to str

    Returns
    -------
    dict of str to str
        Each with what to do about it.
    """
    known = [name.upper() for name in _READERS]
    found = {}
    for variable in environ:
        name = variable.removeprefix(PREFIX)
        if name not in (variable, *known):
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {PREFIX}{near[0]}?" if near else "known: {}"
            found[variable] = advice.format(", ".join(PREFIX + each for each in known))
    return found


@functools.cache
def _warn_of(variable: str, advice: str) -> None:
    log.warning("%s is set, but is no setting of fedexec; %s", visible(variable), advice)


def resolve(
    arguments: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Settings:
    """Settle every setting, and note who settled it.

    Parameters
    ----------
    arguments, flags : mapping of str to object, optional
        From the call and from the command line; None and ``()`` mean "not given".
    environ : mapping of str to str, optional
        Defaults to :data:`os.environ`; an empty string means "not given".
    config : mapping of str to object, optional
        From the file of an application.

    Returns
    -------
    Settings

    Raises
    ------
    SettingsError
        A value makes no sense; the message names the field and where the value came from.
    TypeError
        An argument that no setting has.
    """
    arguments, flags, config = arguments or {}, flags or {}, config or {}
    for name in (*arguments, *flags, *config):
        if name not in _READERS:
            raise TypeError(f"there is no setting {name!r}; known: {', '.join(_READERS)}")
    variables = os.environ if environ is None else environ
    for unknown in unknown_variables(variables).items():
        _warn_of(*unknown)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, read in _READERS.items():
        variable = PREFIX + name.upper()
        candidates = {
            "argument": arguments.get(name),
            "flag": flags.get(name),
            variable: variables.get(variable) or None,
            "config": config.get(name),
        }
        given = {origin: value for origin, value in candidates.items() if value is not None and value != ()}
        sources[name] = next(iter(given), "default")
        if given:
            try:
                values[name] = read(given[sources[name]])
            except SettingsError as exc:
                origin = "" if sources[name] == "argument" else f" ({sources[name]})"
                raise SettingsError(f"{name} {exc}{origin}") from None
    values["auto"] = values.get("max_workers") == AUTO
    if values["auto"]:
        del values["max_workers"]
    values.setdefault("max_workers", available_cores())
    values.setdefault("standby", values["max_workers"])
    values.setdefault("threads_per_worker", max(1, available_cores() // values["max_workers"]))
    return Settings(**values, sources=sources)
