"""What an app keeps in its modules, which each fresh process fills again: a data set, a tokenizer.

A worker tells which variables a message has filled; the caller advises a rehearsal where that seems to pay.
"""

import functools
import statistics
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from fedexec._system.installed import is_installed_file

__all__ = ["Refills", "empty", "filled", "find"]

MESSAGES = 4  # that must have filled the same variables before this is worth a word
WORTH_SECONDS = 0.3  # that one of them must have taken

_modules: list[ModuleType] = []  # the app's own that were loaded where this process was forked from


def find() -> None:
    """Note the modules of the app that are loaded here. Workers that are forked from here know them."""
    _modules[:] = [module for module in list(sys.modules.values()) if _is_own(module)]


def _is_own(module: object) -> bool:
    if not isinstance(module, ModuleType):
        return False
    known = vars(module)  # Asked for an attribute, a lazy module may import something.
    name, file = known.get("__name__"), known.get("__file__")
    if not isinstance(name, str) or not isinstance(file, str):
        return False
    return not name.startswith(("fedexec", "__")) and not is_installed_file(file)


def empty() -> set[str]:
    """Return the variables of the app's modules in which nothing is kept yet: None, [], an unused cache."""
    return {name for name, value in _variables() if _is_empty(value)}


def filled(before: set[str]) -> tuple[str, ...]:
    """Return those of the variables that were :func:`empty` in which something is kept now."""
    return tuple(name for name, value in _variables() if name in before and not _is_empty(value))


def _variables() -> Iterator[tuple[str, Any]]:
    for module in _modules:
        for name, value in list(vars(module).items()):
            if not name.startswith("__"):
                yield f"{vars(module)['__name__']}.{name}", value


def _is_empty(value: object) -> bool:
    if value is None:
        return True
    if type(value) in (list, dict, set):
        return not value
    return isinstance(value, functools._lru_cache_wrapper) and value.cache_info().currsize == 0


class Refills:
    """Counts the messages that have filled variables anew."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        self._is_told = False

    def note(self, kind: str, names: tuple[str, ...], seconds: float) -> str | None:
        """Take note of a message; return a hint, once, if a rehearsal would spare many of its kind much.

        Parameters
        ----------
        kind : str
            Type of the message.
        names : tuple of str
            The variables that it has filled.
        seconds : float
            That the app has taken, imports apart.
        """
        if self._is_told or not names:
            return None
        taken = self._seconds.setdefault((kind, names), [])
        taken.append(seconds)
        if len(taken) < MESSAGES or statistics.median(taken) < WORTH_SECONDS:
            return None
        self._is_told = True
        return (
            f"each {kind} message fills {', '.join(names[:3])} again, in a process of its own, and takes "
            f"{statistics.median(taken):.1f} s. With rehearse=True (--rehearse) workers are born with that"
        )
