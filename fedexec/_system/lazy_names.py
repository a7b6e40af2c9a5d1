"""Imports the names of a package when they are used, so that workers do not import what they never need."""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # type checkers know this name; importing it from typing would take long
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = ["importer"]


def importer(
    package: str, homes: Mapping[str, tuple[str, ...]], modules: tuple[str, ...] = ()
) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package (PEP 562).

    Parameters
    ----------
    package : str
        The package's own ``__name__``.
    homes : mapping of str to tuple of str
        Names that each module defines; the module is relative to the package.
    modules : tuple of str
        Modules of the package that are imported when they are used as attributes of the package.

    Returns
    -------
    callable
        ``get(name)``.
    """
    places = {name: f"{package}.{home}" for home, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(places[name]), name)

    return get
