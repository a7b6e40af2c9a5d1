"""What tasks import in this process, a worker, and how long that takes."""

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from itertools import islice
from types import ModuleType
from typing import Any

from fedexec._system.installed import is_installed

__all__ = [
    "Imports",
    "birth_path",
    "forget_other_versions",
    "keeping",
    "learnt",
    "watch",
]

_bootstrap: Any = importlib._bootstrap
_FILE = "<frozen importlib._bootstrap>"  # Python leaves frames of this file out of tracebacks of imports


class _Thread(threading.local):
    is_importing = False


_thread = _Thread()
_spent = [0.0]  # seconds in imports so far, in all threads; what an import imports is part of it

_keepers: list[tuple[Callable[[], Any], Callable[[Any], object]]] = []  # see `keeping`; one at most

_SOURCE = """
def find_and_load(name, import_):
    is_inner = thread.is_importing
    if is_inner and not keepers:
        return load(name, import_)
    kept = [(restore, state()) for state, restore in keepers]
    thread.is_importing = True
    begun = clock()
    try:
        return load(name, import_)
    finally:
        if not is_inner:
            thread.is_importing = False
            spent[0] += clock() - begun
        if kept and is_installed(name):
            for restore, before in kept:
                restore(before)
"""


@contextlib.contextmanager
def keeping(state: Callable[[], Any], restore: Callable[[Any], object]) -> Iterator[None]:
    """Have no import of a package that is installed change a state, while this lasts.

    Parameters
    ----------
    state : callable
        Returns what is to be kept.
    restore : callable
        Takes that.
    """
    _keepers[:] = [(state, restore)]
    try:
        yield
    finally:
        _keepers.clear()


def watch() -> None:
    """Measure every import from now on, in this process and in those that are forked from it.

    What is already imported costs nothing more: Python asks :mod:`importlib` only for what is new. That it
    calls this function of its module by name is nowhere documented, and the same in CPython 3.11 to 3.14;
    where it is not there, imports are not measured.
    """
    load: Callable[[str, Any], ModuleType] | None = getattr(_bootstrap, "_find_and_load", None)
    if load is None or getattr(load, "__name__", "") == "find_and_load":
        return
    names = {
        "thread": _thread, "load": load, "clock": time.perf_counter, "spent": _spent, "keepers": _keepers,
        "is_installed": is_installed,
    }  # fmt: skip
    exec(compile(_SOURCE, _FILE, "exec"), names)  # so that tracebacks do not show it
    _bootstrap._find_and_load = names["find_and_load"]


class Imports:
    """What is imported from when this is made."""

    def __init__(self) -> None:
        if not birth_path:
            birth_path.extend(sys.path)
        self._known = len(sys.modules)
        self._spent = _spent[0]

    def seconds(self) -> float:
        """Return how long imports took, so far."""
        return _spent[0] - self._spent

    def installed(self) -> tuple[str, ...]:
        """Return the modules that are new, in order: those of Python and of installed packages alone.

        And those alone that this process would have found when it was born, as its template would.
        """
        number = len(sys.modules) - self._known
        if number <= 0:
            return ()
        new = list(islice(reversed(sys.modules), number))
        installed = tuple(name for name in reversed(new) if is_installed(name))
        if sys.path == birth_path:
            return installed
        packages = {name.partition(".")[0] for name in installed}
        others = {package for package in packages if _is_other(package, birth_path)}
        return tuple(name for name in installed if name.partition(".")[0] not in others)


#: ``sys.path`` when this process was born.
birth_path: list[str] = []
#: Modules that workers here are born with because tasks have imported them.
learnt: set[str] = set()


def forget_other_versions() -> None:
    """Drop what was learnt, and is not what an import would find now: ``sys.path`` has changed."""
    for package in {name.partition(".")[0] for name in learnt} & set(sys.modules):
        if _is_other(package, sys.path):
            for name in list(sys.modules):
                if name == package or name.startswith(f"{package}."):
                    del sys.modules[name]


def _is_other(package: str, path: list[str]) -> bool:
    """Return whether an import by that path would find something else than what is loaded."""
    known = getattr(sys.modules.get(package), "__spec__", None)
    found = PathFinder.find_spec(package, path)
    return known is not None and found is not None and found.origin != known.origin
