"""What an app keeps in its modules (a data set, a tokenizer), which each fresh process has to load again.

A worker reports which variables a message has filled, and the caller recommends a rehearsal if it would save
time.
"""

import functools
import statistics
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from fedexec._system.installed import is_installed_file

__all__ = ["Refills", "empty", "filled", "find"]

MESSAGES = 4  # number of messages that must have filled the same variables before a hint is given
WORTH_SECONDS = 0.3  # time that a median one of them must have taken

_modules: list[ModuleType] = []  # the app's own modules that were loaded in the template


def find() -> None:
    """Note the app's modules that are loaded in this process; forked workers inherit the list."""
    _modules[:] = [module for module in list(sys.modules.values()) if _is_own(module)]


def _is_own(module: object) -> bool:
    if not isinstance(module, ModuleType):
        return False
    # Read the attributes from vars(), because getattr() may make a lazy module import something.
    attributes = vars(module)
    name, file = attributes.get("__name__"), attributes.get("__file__")
    if not isinstance(name, str) or not isinstance(file, str):
        return False
    return not name.startswith(("fedexec", "__")) and not is_installed_file(file)


def empty() -> set[str]:
    """Return the variables of the app's modules that are empty: None, an empty container, an unused cache.

    Returns
    -------
    set of str
        ``module.variable``.
    """
    return {name for name, value in _variables() if _is_empty(value)}


def filled(before: set[str]) -> tuple[str, ...]:
    """Return the variables that have been filled since :func:`empty` was called.

    Parameters
    ----------
    before : set of str
        Result of :func:`empty`.

    Returns
    -------
    tuple of str
    """
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
    """Counts the messages that have filled variables again."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, tuple[str, ...]], list[float]] = {}
        self._is_told = False

    def note(self, kind: str, names: tuple[str, ...], seconds: float) -> str | None:
        """Count a message.

        Parameters
        ----------
        kind : str
            Type of the message.
        names : tuple of str
            Variables that the message has filled.
        seconds : float
            Time that the app has taken, without imports.

        Returns
        -------
        str or None
            A hint, returned once, if a rehearsal would save much time for messages of this type.
        """
        if self._is_told or not names:
            return None
        taken = self._seconds.setdefault((kind, names), [])
        taken.append(seconds)
        if len(taken) < MESSAGES or statistics.median(taken) < WORTH_SECONDS:
            return None
        self._is_told = True
        return (
            f"each {kind} message fills {', '.join(names[:3])} again, in a fresh process, and takes "
            f"{statistics.median(taken):.1f} s. With rehearse=True (--rehearse), workers inherit the content"
        )
