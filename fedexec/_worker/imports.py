"""Measures what tasks import in this process, a worker, and how long the imports take."""

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
_FILE = "<frozen importlib._bootstrap>"  # Python omits frames of this file from tracebacks of failed imports


class _Thread(threading.local):
    is_importing = False


_thread = _Thread()
_spent = [0.0]  # seconds of imports so far, in all threads; nested imports are part of the outer import

_keepers: list[tuple[Callable[[], Any], Callable[[Any], object]]] = []  # set by `keeping`; at most one

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
    """Undo what imports of installed packages change in a state, as long as the context lasts.

    Parameters
    ----------
    state : callable
        ``state()`` returns the state.
    restore : callable
        ``restore(state)`` sets the state.
    """
    _keepers[:] = [(state, restore)]
    try:
        yield
    finally:
        _keepers.clear()


def watch() -> None:
    """Measure every import from now on, in this process and in processes that are forked from it.

    An import of a module that is already loaded costs nothing more, because Python asks :mod:`importlib` only
    for new modules. Python calls importlib's function ``_find_and_load`` by that name; this is undocumented,
    but the same in CPython 3.11 to 3.14. If there is no such function, imports are not measured.
    """
    load: Callable[[str, Any], ModuleType] | None = getattr(_bootstrap, "_find_and_load", None)
    if load is None or getattr(load, "__name__", "") == "find_and_load":
        return
    names = {
        "thread": _thread, "load": load, "clock": time.perf_counter, "spent": _spent, "keepers": _keepers,
        "is_installed": is_installed,
    }  # fmt: skip
    exec(compile(_SOURCE, _FILE, "exec"), names)  # compiled under this file name, tracebacks do not show it
    _bootstrap._find_and_load = names["find_and_load"]


class Imports:
    """The imports of this process since this object was made."""

    def __init__(self) -> None:
        if not birth_path:
            birth_path.extend(sys.path)
        self._known = len(sys.modules)
        self._spent = _spent[0]

    def seconds(self) -> float:
        """Return how many seconds imports have taken since this object was made."""
        return _spent[0] - self._spent

    def installed(self) -> tuple[str, ...]:
        """Return the modules that are new, in the order in which they were imported.

        These are only modules of Python and of installed packages, and only those that the ``sys.path`` of
        this process's start would find too, because that is the path of the template.
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


#: ``sys.path`` at the start of this process.
birth_path: list[str] = []
#: Modules that workers inherit from the template because tasks have imported them.
learnt: set[str] = set()


def forget_other_versions() -> None:
    """Unload learnt modules that an import would no longer find, because ``sys.path`` has changed."""
    for package in {name.partition(".")[0] for name in learnt} & set(sys.modules):
        if _is_other(package, sys.path):
            for name in list(sys.modules):
                if name == package or name.startswith(f"{package}."):
                    del sys.modules[name]


def _is_other(package: str, path: list[str]) -> bool:
    """Return whether an import with that path would find another file than the loaded package has."""
    loaded_spec = getattr(sys.modules.get(package), "__spec__", None)
    found_spec = PathFinder.find_spec(package, path)
    return loaded_spec is not None and found_spec is not None and found_spec.origin != loaded_spec.origin
