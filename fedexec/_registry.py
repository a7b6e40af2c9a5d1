"""From a backend's name to its class: strings, resolved when one is used and not before.

Plug-ins register in the entry-point group ``fedexec.backends``, as ``name = "module:Class"``.
"""

import difflib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, distributions
from typing import Any

from fedexec._system.find_by_name import find_attribute, split_name
from fedexec.errors import BackendUnavailableError, UnknownBackendError
from fedexec.interface import Backend, Capability
from fedexec.settings import Settings

__all__ = ["BackendInfo", "backends", "load", "load_chosen"]

GROUP = "fedexec.backends"
NEEDS_POSIX = "it needs Linux or macOS; on Windows use WSL2"

_ISOLATED = Capability.ISOLATED | Capability.SURVIVES_DEATH | Capability.KILLS_ONE


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What is known of a backend without importing it.

    Attributes
    ----------
    name : str
    target : str
        ``"module:Class"``.
    summary : str
        One line.
    capabilities : Capability or None
        Its promises; None for a plug-in, whose class is not imported to find out.
    requires : str or None
        The package it needs.
    install : str or None
        The command that installs that package.
    needs_posix : bool
        It runs on Linux and macOS only.
    """

    name: str
    target: str
    summary: str
    capabilities: Capability | None = None
    requires: str | None = None
    install: str | None = None
    needs_posix: bool = False

    @property
    def wrong_system(self) -> str | None:
        """Why it cannot run on this system, whatever is installed; None if it can."""
        return NEEDS_POSIX if self.needs_posix and sys.platform == "win32" else None

    @property
    def available(self) -> bool:
        """Whether it can run here; it is looked up, not imported."""
        packages = [self.target.partition(":")[0].partition(".")[0], self.requires]
        if self.wrong_system is not None:
            return False
        return all(package is None or importlib.util.find_spec(package) is not None for package in packages)

    def as_dict(self) -> dict[str, Any]:
        """Return this as JSON knows it."""
        promises = None
        if self.capabilities is not None:
            promises = [flag.name.lower() for flag in self.capabilities if flag.name]
        return {
            "name": self.name,
            "summary": self.summary,
            "promises": promises,
            "available": self.available,
            "install": None if self.available or self.wrong_system else self.install,
            "reason": self.wrong_system,
        }


_BUILTIN = {
    info.name: info
    for info in (
        BackendInfo(
            "standby",
            "fedexec_backends.standby:StandbyBackend",
            "a worker forked ahead of need from a preloaded template, fresh for every task",
            _ISOLATED | Capability.FRESH_PROCESS | Capability.STANDS_BY | Capability.SHARES_MEMORY,
            needs_posix=True,
        ),
        BackendInfo(
            "process",
            "fedexec_backends.process:ProcessBackend",
            "one multiprocessing.Process per task, its result in a Manager's dict (the tutorial's way)",
            _ISOLATED | Capability.FRESH_PROCESS | Capability.SHARES_MEMORY,
            needs_posix=True,
        ),
        BackendInfo(
            "pool",
            "fedexec_backends.pool:PoolBackend",
            "concurrent.futures.ProcessPoolExecutor with max_tasks_per_child=1",
            _ISOLATED | Capability.FRESH_PROCESS | Capability.SHARES_MEMORY,
            needs_posix=True,
        ),
        BackendInfo(
            "loky",
            "fedexec_backends.loky:LokyBackend",
            "long-lived loky workers, replaced when they hold more than memory_limit",
            _ISOLATED | Capability.RECYCLES | Capability.SHARES_MEMORY,
            requires="loky",
            install="pip install 'fedexec[loky]'",
            needs_posix=True,
        ),
        BackendInfo(
            "inline",
            "fedexec_backends.inline:InlineBackend",
            "threads of the caller's own process: the baseline, no isolation",
            Capability(0),
        ),
    )
}


def _plugins() -> dict[str, EntryPoint]:
    # Not by `entry_points`, which fails on what import ignores in sys.path: bytes, Path objects, None.
    path = [entry for entry in sys.path if isinstance(entry, str)]
    found: dict[str, EntryPoint] = {}
    for distribution in distributions(path=path):
        for entry in distribution.entry_points.select(group=GROUP):
            found.setdefault(entry.name, entry)  # the first on the path, as import has it
    return found


def backends() -> tuple[BackendInfo, ...]:
    """List every backend, built-in and plugged in. None of them is imported.

    Returns
    -------
    tuple of BackendInfo
    """
    # Built-ins last, so that they win: a plug-in must not replace "process" silently.
    found = {name: BackendInfo(name, entry.value, "plug-in") for name, entry in _plugins().items()}
    plugged = [info for name, info in sorted(found.items()) if name not in _BUILTIN]
    return (*_BUILTIN.values(), *plugged)


def load(name: str) -> type[Backend]:
    """Import the class of one backend.

    Raises
    ------
    UnknownBackendError
        No backend has this name; says which exist, and the nearest.
    BackendUnavailableError
        Its package is not installed, and it says how to install it; or it does not run on this system.
    """
    info = _BUILTIN.get(name)
    if info is None:
        entry = _plugins().get(name)
        if entry is None:
            known = tuple(known.name for known in backends())
            nearest = difflib.get_close_matches(name, known, n=1)
            raise UnknownBackendError(name, known, nearest[0] if nearest else None)
        info = BackendInfo(name, entry.value, "plug-in")
    if info.wrong_system:
        raise BackendUnavailableError(name, info.wrong_system)
    try:
        backend: type[Backend] = find_attribute(*split_name(info.target))
    except (ImportError, AttributeError, ValueError) as exc:
        raise BackendUnavailableError(name, str(exc), info.install) from exc
    return backend


def load_chosen(settings: Settings) -> type[Backend]:
    """Import the class of the backend that settings name; :func:`load` says what it raises."""
    try:
        return load(settings.backend)
    except UnknownBackendError as exc:
        if settings.sources.get("backend", "argument") != "argument":  # the call itself shows that
            exc.given_by = settings.given_by("backend")
        raise
