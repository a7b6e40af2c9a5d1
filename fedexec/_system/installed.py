"""Tells modules of Python and of installed packages from the user's own modules, which may change."""

import importlib
import sys
from pathlib import Path

__all__ = ["OURS", "is_installed", "is_installed_file"]

OURS = ("fedexec", "fedexec_backends")  # these count as installed, even if they run from a working copy
_FOLDERS = {"site-packages", "dist-packages"}
_STANDARD = importlib.__file__.rpartition("importlib")[0]


def is_installed(name: str) -> bool:
    """Return whether a loaded module belongs to Python or to an installed package.

    Other modules are the user's own: they may change while a program runs, and may have effects when they
    are imported. The same holds for packages that are installed in place (``pip install -e``).

    Parameters
    ----------
    name : str
        Name of a module that is loaded in this process.

    Returns
    -------
    bool
    """
    package = name.partition(".")[0]
    if package in ("__main__", "__mp_main__"):
        return False
    if package in OURS:
        return True
    spec = getattr(sys.modules.get(name), "__spec__", None)
    if spec is None or spec.name != name:
        return False
    origin = spec.origin or next(iter(spec.submodule_search_locations or ()), "")
    return origin in ("built-in", "frozen") or is_installed_file(origin)


def is_installed_file(file: str) -> bool:
    """Return whether a file belongs to Python or to an installed package.

    Parameters
    ----------
    file : str
        Path of the file.

    Returns
    -------
    bool
    """
    return file.startswith(_STANDARD) or not _FOLDERS.isdisjoint(Path(file).parts)
