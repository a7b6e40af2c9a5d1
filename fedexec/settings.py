"""The settings of an executor, and the source of each: argument > flag > environment > config > default.

Each setting is described once, where :class:`Settings` declares it. Derived from this are its flag on the
command line and the text of ``--help``, its environment variable (``FEDEXEC_`` and its name in capitals), its
key in an app's configuration (``executor-`` and its name with hyphens) and its entry in the documentation.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedexec._system import misspelt_variables, setting_values
from fedexec._system.available_resources import available_cores
from fedexec._system.setting_values import AUTO, LARGEST
from fedexec._system.sizes import parse_size
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

FORK_IS_SAFE = sys.platform == "linux"  # on macOS, system libraries start threads
DEFAULT_BACKEND = "standby" if FORK_IS_SAFE else "process"
PREFIX = "FEDEXEC_"
KEY_PREFIX = "executor-"  # in the configuration of an app


@dataclass(frozen=True, slots=True)
class Option:
    """The description of one setting, from which command line and documentation are derived.

    Attributes
    ----------
    name : str
        Name of the field of :class:`Settings`, and of the argument of :func:`fedexec.create_executor`.
    read : callable
        ``read(given)`` returns the value of the setting, or raises SettingsError.
    metavar : str
        Placeholder for the value in ``--help``.
    text : str
        One or two sentences in Markdown that say what the setting does.
    default : str
        The default, in words.
    """

    name: str
    read: Callable[[Any], object]
    metavar: str
    text: str
    default: str

    @property
    def flag(self) -> str:
        """Flag on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return PREFIX + self.name.upper()

    @property
    def key(self) -> str:
        """Key in the configuration of an app."""
        return KEY_PREFIX + self.name.replace("_", "-")

    def spelled(self, source: str) -> str:
        """Return the name of the setting in a source.

        Parameters
        ----------
        source : str
            As in :attr:`Settings.sources`.

        Returns
        -------
        str
            Such as ``"--timeout"`` for ``"flag"``.
        """
        return {"argument": f"{self.name}=", "flag": self.flag, "config": self.key}.get(source, source)


def _setting(value: Any, read: Callable[[Any], Any], metavar: str, text: str, default: str) -> Any:
    """Declare a field of :class:`Settings`."""
    return field(default=value, metadata={"option": (read, metavar, text, default)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The resolved settings of one executor.

    Each field is described where it is declared. Sizes are in bytes, times in seconds.

    Attributes
    ----------
    auto : bool
        Whether ``max_workers="auto"`` was given, so that as many tasks run at once as memory allows.
    sources : mapping of str to str
        Source of each field: "argument", "flag", the name of an environment variable, "config" or "default".
    """

    backend: str = _setting(
        DEFAULT_BACKEND,
        setting_values.backend_name,
        "NAME",
        "Where tasks run: one of the names that `fedexec backends` lists.",
        "`standby` on Linux, `process` elsewhere",
    )
    max_workers: int = _setting(
        1,
        setting_values.workers,
        "N",
        "How many tasks run at once. With `auto`, as many as the memory of host and devices allows.",
        "the number of cores that this process may use; on `ray` and `dask` 1,000",
    )
    start_method: str = _setting(
        "forkserver" if FORK_IS_SAFE else "spawn",
        setting_values.start_method,
        "METHOD",
        "How worker processes start: `forkserver` forks them from a template that has imported the preload; "
        "`spawn` starts a fresh interpreter for each.",
        "`forkserver` on Linux, `spawn` elsewhere",
    )
    preload: tuple[str, ...] = _setting(
        (),
        setting_values.modules,
        "MODULES",
        "Modules that each worker has imported before its first task, separated by commas.",
        "none",
    )
    timeout: float | None = _setting(
        None,
        setting_values.seconds,
        "SECONDS",
        "How many seconds a task may take after it was given to a worker. Then its worker is ended.",
        "no limit",
    )
    retries: int = _setting(
        0, setting_values.not_negative, "N", "How often a task runs again if its worker dies.", "0"
    )
    memory_limit: int | None = _setting(
        None,
        parse_size,
        "SIZE",
        "Limit of host memory, such as `2GiB`. A reused worker that holds more after a task is replaced.",
        "no limit",
    )
    device_memory_limit: int | None = _setting(
        None,
        parse_size,
        "SIZE",
        "Limit of device memory, such as `2GiB`. A reused worker that holds more after a task is replaced.",
        "no limit",
    )
    enforce_limits: bool = _setting(
        False,
        setting_values.switch,
        "BOOL",
        "Whether a task that exceeds `memory_limit` or `device_memory_limit` while it runs is ended.",
        "`false`",
    )
    device: str | None = _setting(
        None,
        setting_values.device,
        "NAME",
        "The devices on which tasks compute: `none`, UUIDs or indices separated by commas, or "
        "`emulated:24GiB`.",
        "all visible devices",
    )
    threads_per_worker: int = _setting(
        1,
        setting_values.at_least_one,
        "N",
        "How many threads OpenMP, MKL, OpenBLAS and torch may use in each worker.",
        "number of cores / `max_workers`, at least 1",
    )
    max_tasks_per_child: int = _setting(
        1, setting_values.at_least_one, "N", "How many tasks a worker of `standby` runs before it ends.", "1"
    )
    standby: int = _setting(
        1, setting_values.not_negative, "N", "How many workers of `standby` wait for tasks.", "`max_workers`"
    )
    shared_memory: bool = _setting(
        True,
        setting_values.switch,
        "BOOL",
        "Whether arrays and CPU tensors of one megabyte or more go through shared memory.",
        "`true`, except on `process`",
    )
    preload_timeout: float = _setting(
        120.0,
        setting_values.seconds,
        "SECONDS",
        "How many seconds the preload and the warm-up may take.",
        "120",
    )
    log_level: str | None = _setting(
        None,
        setting_values.log_level,
        "LEVEL",
        "Level of the logger `fedexec`: `DEBUG`, `INFO`, `WARNING` or `ERROR`. `INFO` shows each setting "
        "and its source.",
        "the level that the application has set",
    )
    learn: bool = _setting(
        True,
        setting_values.switch,
        "BOOL",
        "Whether the template imports the modules of installed packages that tasks have imported, so that "
        "later workers have them.",
        "`true`",
    )
    seed: int | None = _setting(
        None,
        setting_values.not_negative,
        "N",
        "Seed of the random numbers of tasks; each task's numbers follow from it and the task's number. It "
        "has no effect on `inline`.",
        "none, so that the random numbers of different tasks are independent",
    )
    node_backend: str = _setting(
        DEFAULT_BACKEND,
        setting_values.backend_name,
        "NAME",
        "The backend of each node of a cluster, on `ray` and `dask`.",
        "`standby` on Linux, `process` elsewhere",
    )
    node_workers: int | str | None = _setting(
        None,
        setting_values.workers,
        "N",
        "How many tasks each node of a cluster runs at once, on `ray` and `dask`. With `auto`, as many as "
        "the memory of its host and devices allows.",
        "on `ray` the CPUs that Ray gives the node, on `dask` the number of cores of the node",
    )
    node_timeout: float = _setting(
        5.0,
        setting_values.seconds,
        "SECONDS",
        "After how many seconds without a sign of life a node of a cluster is given up, on `ray` and `dask`.",
        "5",
    )
    ray_address: str | None = _setting(
        None,
        setting_values.address,
        "ADDRESS",
        "Address of the Ray cluster for `ray`; `local` starts one on this machine.",
        "the cluster that the program is connected to, else `RAY_ADDRESS`, else `local`",
    )
    dask_address: str | None = _setting(
        None,
        setting_values.address,
        "ADDRESS",
        "Address of the Dask scheduler for `dask`; `local` starts one on this machine.",
        "that of the current `distributed.Client`, else `local`",
    )
    auto: bool = False
    sources: Mapping[str, str] = field(default_factory=dict)

    def given_by(self, name: str) -> str:
        """Return what has given a setting its value: an argument, a flag, a variable or a key of an app.

        Parameters
        ----------
        name : str
            Name of the field.

        Returns
        -------
        str
            Such as ``"--timeout"``; ``"default"`` if the setting was not given.
        """
        return _OPTIONS[name].spelled(self.sources.get(name, "default"))

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as a dictionary that :mod:`json` can write."""
        return asdict(self)

    def __str__(self) -> str:
        shown = ["backend", "max_workers", "start_method", "timeout", "memory_limit", "threads_per_worker"]
        shown += ["device"] if self.device else []
        return ", ".join(
            f"{name}={getattr(self, name)} ({self.sources.get(name, 'default')})" for name in shown
        )


_OPTIONS = {
    setting.name: Option(setting.name, *setting.metadata["option"])
    for setting in dataclasses.fields(Settings)
    if "option" in setting.metadata
}


def options() -> tuple[Option, ...]:
    """Return the description of every setting, in the order in which they are declared."""
    return tuple(_OPTIONS.values())


def unknown_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Find variables that begin with ``FEDEXEC_`` but are not a setting, so they may be misspelt.

    Parameters
    ----------
    environ : mapping of str to str

    Returns
    -------
    dict of str to str
        Advice by name of the variable.
    """
    return misspelt_variables.find(environ, PREFIX, [name.upper() for name in _OPTIONS])


def warn_of_unknown_variables(environ: Mapping[str, str]) -> None:
    """Warn of each variable that begins with ``FEDEXEC_`` but is not a setting, once in this process.

    Parameters
    ----------
    environ : mapping of str to str
    """
    for variable, advice in unknown_variables(environ).items():
        misspelt_variables.warn_of(variable, advice)


def resolve(
    arguments: Mapping[str, Any] | None = None,
    flags: Mapping[str, Any] | None = None,
    environ: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Settings:
    """Determine the value and the source of every setting.

    Parameters
    ----------
    arguments, flags : mapping of str to object, optional
        Values of the call and of the command line; None and ``()`` mean "not given".
    environ : mapping of str to str, optional
        Environment variables, by default :data:`os.environ`; an empty string means "not given".
    config : mapping of str to object, optional
        Values of the configuration of an application.

    Returns
    -------
    Settings

    Raises
    ------
    SettingsError
        A value is invalid; the message names the setting and the source of the value.
    TypeError
        A name is not that of a setting.
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
            values[name] = _read(option, given[sources[name]], sources[name])
    values["auto"] = values.get("max_workers") == AUTO
    if values["auto"]:
        del values["max_workers"]
    values.setdefault("max_workers", available_cores())
    values.setdefault("standby", values["max_workers"])
    values.setdefault("threads_per_worker", max(1, available_cores() // values["max_workers"]))
    return Settings(**values, sources=sources)


def _read(option: Option, given: object, source: str) -> object:
    """Read a value that was given; errors name the setting and the source of the value."""
    try:
        return option.read(given)
    except SettingsError as exc:
        origin = "" if source == "argument" else f" ({option.spelled(source)})"
        raise SettingsError(f"{option.name} {exc}{origin}") from None
