"""Finds the class of a backend by its name. A backend is imported only when it is used.

Plug-ins register in the entry-point group ``fedexec.backends``, as ``name = "module:Class"``.
"""

import importlib.util
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedexec._system.find_by_name import find_attribute, split_name
from fedexec.errors import BackendUnavailableError, UnknownBackendError
from fedexec.interface import Backend, Capability
from fedexec.settings import Settings

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["BackendInfo", "backends", "load", "load_chosen"]

GROUP = "fedexec.backends"
NEEDS_POSIX = "it needs Linux or macOS; on Windows use WSL2"

_ISOLATED = Capability.ISOLATED | Capability.SURVIVES_DEATH | Capability.KILLS_ONE
_ON_NODES = _ISOLATED | Capability.FRESH_PROCESS | Capability.STANDS_BY | Capability.REMOTE


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """What is known about a backend without importing it.

    Attributes
    ----------
    name : str
    target : str
        Where the class is: ``"module:Class"``.
    summary : str
        Description in one line.
    capabilities : Capability or None
        What the backend guarantees; None for a plug-in, because that would require importing its class.
    requires : str or None
        Name of the package that the backend needs.
    install : str or None
        The command that installs that package.
    needs_posix : bool
        Whether the backend runs on Linux and macOS only.
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
        """Why the backend cannot run on this system, whatever is installed; None if it can."""
        return NEEDS_POSIX if self.needs_posix and sys.platform == "win32" else None

    @property
    def available(self) -> bool:
        """Whether the backend can run here. This looks for packages, and imports none."""
        packages = [self.target.partition(":")[0].partition(".")[0], self.requires]
        if self.wrong_system is not None:
            return False
        return all(package is None or importlib.util.find_spec(package) is not None for package in packages)

    def as_dict(self) -> dict[str, Any]:
        """Return the description as a dictionary that :mod:`json` can write."""
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
            "a fresh worker for every task, forked in advance from a template",
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
            "threads of the caller's own process, without isolation: the baseline",
            Capability(0),
        ),
        BackendInfo(
            "ray",
            "fedexec_backends.ray:RayBackend",
            "the nodes of a Ray cluster, each with a standby executor of its own",
            _ON_NODES,
            requires="ray",
            install="pip install 'fedexec[ray]'",
            needs_posix=True,
        ),
        BackendInfo(
            "dask",
            "fedexec_backends.dask:DaskBackend",
            "the hosts of a Dask cluster, each with a standby executor of its own",
            _ON_NODES,
            requires="distributed",
            install="pip install 'fedexec[dask]'",
            needs_posix=True,
        ),
    )
}


def _plugins() -> "dict[str, EntryPoint]":
    from importlib.metadata import distributions  # takes as long as the rest of `import fedexec`

    # Do not use `entry_points`: it fails on bytes, Path objects and None in sys.path, which import ignores.
    path = [entry for entry in sys.path if isinstance(entry, str)]
    entries: dict[str, EntryPoint] = {}
    for distribution in distributions(path=path):
        for entry in distribution.entry_points.select(group=GROUP):
            entries.setdefault(entry.name, entry)  # the first on the path wins, as for imports
    return entries


def backends() -> tuple[BackendInfo, ...]:
    """List all backends: those of fedexec and those of plug-ins. None of them is imported.

    Returns
    -------
    tuple of BackendInfo
    """
    # A built-in backend wins over a plug-in: no plug-in may replace "process" silently.
    plugins = {name: BackendInfo(name, entry.value, "plug-in") for name, entry in _plugins().items()}
    others = [info for name, info in sorted(plugins.items()) if name not in _BUILTIN]
    return (*_BUILTIN.values(), *others)


def load(name: str) -> type[Backend]:
    """Import the class of one backend.

    Parameters
    ----------
    name : str

    Returns
    -------
    type
        A subclass of :class:`~fedexec.interface.Backend`.

    Raises
    ------
    UnknownBackendError
        There is no backend of this name; the message names all backends, and the most similar name.
    BackendUnavailableError
        The package of the backend is not installed (the message says how to install it), or the backend does
        not run on this system.
    """
    info = _BUILTIN.get(name)
    if info is None:
        entry = _plugins().get(name)
        if entry is None:
            import difflib

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
    """Import the class of the backend that settings name; see :func:`load` for what this raises.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    type
    """
    try:
        return load(settings.backend)
    except UnknownBackendError as exc:
        if settings.sources.get("backend", "argument") != "argument":  # a call shows its argument itself
            exc.given_by = settings.given_by("backend")
        raise
