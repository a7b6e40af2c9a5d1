"""What an executor was told to do, and by whom: argument > flag > environment > config > default.

Each setting is described once, where :class:`Settings` declares it. From there follow its flag on the command
line and the text of ``--help``, its variable in the environment (``FEDEXEC_`` and its name in capitals), its
key in an app's configuration (``executor-`` and its name with hyphens) and its row in the documentation.
"""

import dataclasses
import difflib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedexec._system.machine import available_cores
from fedexec._system.sizes import parse_size
from fedexec._system.visible import visible
from fedexec.errors import SettingsError

__all__ = [
    "KEY_PREFIX",
    "LARGEST",
    "PREFIX",
    "Option",
    "Settings",
    "options",
    "resolve",
    "unknown_variables",
    "warn_of_unknown_variables",
]

log = logging.getLogger("fedexec")

FORK_IS_SAFE = sys.platform == "linux"  # macOS's own libraries start threads
DEFAULT_BACKEND = "standby" if FORK_IS_SAFE else "process"
AUTO = "auto"
PREFIX = "FEDEXEC_"
KEY_PREFIX = "executor-"  # in the configuration of an app
START_METHODS = ("forkserver", "spawn")
LARGEST = 2**64 - 1


# ---------------------------------------------------------------- how a value is read


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
        if number > LARGEST:
            raise SettingsError(f"must be at most {LARGEST}, got {number}")
        return number

    return read


_at_least_one = _whole(1, "must be greater than 0")
_not_negative = _whole(0, "must not be negative")


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


# ---------------------------------------------------------------- the table


@dataclass(frozen=True, slots=True)
class Option:
    """One setting, as it is described wherever a user meets it.

    Attributes
    ----------
    name : str
        The field of :class:`Settings`, and the argument of :func:`fedexec.create_executor`.
    read : callable
        Turns what was given into the value; raises SettingsError.
    metavar : str
        What stands for a value in ``--help``.
    text : str
        What it does: a sentence or two in Markdown.
    default : str
        The default, in words.
    """

    name: str
    read: Callable[[Any], Any]
    metavar: str
    text: str
    default: str

    @property
    def flag(self) -> str:
        """How the command line spells it."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """How the environment spells it."""
        return PREFIX + self.name.upper()

    @property
    def key(self) -> str:
        """How an app's configuration spells it."""
        return KEY_PREFIX + self.name.replace("_", "-")

    def spelled(self, source: str) -> str:
        """How the one who set it has spelled it; `source` is as in :attr:`Settings.sources`."""
        return {"argument": f"{self.name}=", "flag": self.flag, "config": self.key}.get(source, source)


def _setting(value: Any, read: Callable[[Any], Any], metavar: str, text: str, default: str) -> Any:
    """Declare a field of :class:`Settings`."""
    return field(default=value, metadata={"option": (read, metavar, text, default)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The resolved settings of one executor.

    Each field says what it means where it is declared. Sizes are bytes here, and times are seconds.

    Attributes
    ----------
    auto : bool
        ``max_workers="auto"`` was asked for: as many tasks run at once as memory allows.
    sources : mapping of str to str
        Field name to who set it: "argument", "flag", the environment variable, "config" or "default".
    """

    backend: str = _setting(
        DEFAULT_BACKEND,
        _name,
        "NAME",
        "Where tasks run: a name that `fedexec backends` lists.",
        "`standby` on Linux, `process` elsewhere",
    )
    max_workers: int = _setting(
        1,
        _workers,
        "N",
        "How many tasks run at once; `auto`: as many as the memory of the host and of the devices allows.",
        "the cores that this process may use",
    )
    start_method: str = _setting(
        "forkserver" if FORK_IS_SAFE else "spawn",
        _start_method,
        "METHOD",
        "How worker processes start: `forkserver` forks them from a template that has imported the preload, "
        "`spawn` starts a fresh interpreter for each.",
        "`forkserver` on Linux, `spawn` elsewhere",
    )
    preload: tuple[str, ...] = _setting(
        (),
        _modules,
        "MODULES",
        "Modules that a worker has imported before its first task, separated by commas.",
        "none",
    )
    timeout: float | None = _setting(
        None,
        _seconds,
        "SECONDS",
        "How long a task may take from the moment it is given to a worker; then its worker is ended.",
        "no limit",
    )
    retries: int = _setting(
        0, _not_negative, "N", "How often a task runs again when its worker died under it.", "0"
    )
    memory_limit: int | None = _setting(
        None,
        parse_size,
        "SIZE",
        "Host memory, such as `2GiB`; a reused worker that holds more after a task is replaced.",
        "no limit",
    )
    device_memory_limit: int | None = _setting(
        None,
        parse_size,
        "SIZE",
        "The same for what a reused worker holds of its device after a task.",
        "no limit",
    )
    enforce_limits: bool = _setting(
        False,
        _switch,
        "BOOL",
        "Whether a task that exceeds one of these two limits while it runs is ended.",
        "`false`",
    )
    device: str | None = _setting(
        None,
        _device,
        "NAME",
        "The devices that tasks compute on: `none`, UUIDs or indices separated by commas, or "
        "`emulated:24GiB`.",
        "all that are visible",
    )
    threads_per_worker: int = _setting(
        1,
        _at_least_one,
        "N",
        "How many threads OpenMP, MKL, OpenBLAS and torch may use in each worker.",
        "cores / `max_workers`, at least 1",
    )
    max_tasks_per_child: int = _setting(
        1, _at_least_one, "N", "How many tasks a worker of `standby` runs before it ends.", "1"
    )
    standby: int = _setting(
        1, _not_negative, "N", "How many workers of `standby` wait ahead of need.", "`max_workers`"
    )
    shared_memory: bool = _setting(
        True,
        _switch,
        "BOOL",
        "Whether arrays and CPU tensors of a megabyte and more go through shared memory.",
        "`true`, except on `process`",
    )
    preload_timeout: float = _setting(
        120.0, _seconds, "SECONDS", "How long the preload and the warm-up may take.", "120"
    )
    log_level: str | None = _setting(
        None,
        _log_level,
        "LEVEL",
        "Level of the logger `fedexec`: `DEBUG`, `INFO`, `WARNING` or `ERROR`. `INFO` shows what was chosen, "
        "and by whom.",
        "as the application has it",
    )
    learn: bool = _setting(
        True,
        _switch,
        "BOOL",
        "Whether later workers are born with the modules of installed packages that tasks have imported.",
        "`true`",
    )
    seed: int | None = _setting(
        None,
        _not_negative,
        "N",
        "What the random numbers of each task follow from, together with the task's number; not on `inline`.",
        "the random numbers of different tasks are independent",
    )
    auto: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)

    def given_by(self, name: str) -> str:
        """Return how a setting was spelled where it was set: a flag, a variable, or a key of a configuration.

        Parameters
        ----------
        name : str
            A field.

        Returns
        -------
        str
            ``"default"`` where nobody has set it.
        """
        return _OPTIONS[name].spelled(self.sources.get(name, "default"))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON knows them."""
        return asdict(self)

    def __str__(self) -> str:
        shown = ["backend", "max_workers", "start_method", "timeout", "memory_limit", "threads_per_worker"]
        shown += ["device"] if self.device else []
        return ", ".join(
            f"{name}={getattr(self, name)} ({self.sources.get(name, 'default')})" for name in shown
        )


_OPTIONS = {
    each.name: Option(each.name, *each.metadata["option"])
    for each in dataclasses.fields(Settings)
    if "option" in each.metadata
}


def options() -> tuple[Option, ...]:
    """Return the description of every setting, in the order in which they are declared."""
    return tuple(_OPTIONS.values())


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
    known = [name.upper() for name in _OPTIONS]
    found = {}
    for variable in environ:
        name = variable.removeprefix(PREFIX)
        if name not in (variable, *known):
            near = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {PREFIX}{near[0]}?" if near else "known: {}"
            found[variable] = advice.format(", ".join(PREFIX + each for each in known))
    return found


def warn_of_unknown_variables(environ: Mapping[str, str]) -> None:
    """Log a warning of each variable that looks like ours and is no setting, once in this process."""
    for variable, advice in unknown_variables(environ).items():
        _warn_of(variable, advice)


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
        if name not in _OPTIONS:
            raise TypeError(f"there is no setting {name!r}; known: {', '.join(_OPTIONS)}")
    variables = os.environ if environ is None else environ
    warn_of_unknown_variables(variables)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, option in _OPTIONS.items():
        variable = option.variable
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
                values[name] = option.read(given[sources[name]])
            except SettingsError as exc:
                origin = "" if sources[name] == "argument" else f" ({option.spelled(sources[name])})"
                raise SettingsError(f"{name} {exc}{origin}") from None
    values["auto"] = values.get("max_workers") == AUTO
    if values["auto"]:
        del values["max_workers"]
    values.setdefault("max_workers", available_cores())
    values.setdefault("standby", values["max_workers"])
    values.setdefault("threads_per_worker", max(1, available_cores() // values["max_workers"]))
    return Settings(**values, sources=sources)
