"""Which modules are of Python or of installed packages, and which are the user's own and may change."""

import importlib
import sys
from pathlib import Path

__all__ = ["OURS", "is_installed", "is_installed_file"]

OURS = ("fedexec", "fedexec_backends")  # installed, wherever they lie
_FOLDERS = {"site-packages", "dist-packages"}
_STANDARD = importlib.__file__.rpartition("importlib")[0]


def is_installed(name: str) -> bool:
    """Return whether a module that is loaded here is Python's or an installed package's, not the user's own.

    The user's own may change while a program runs, and do something when they are imported; so may those
    of packages that are installed in place (``pip install -e``).
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
    """Return whether a file is of Python or of an installed package."""
    return file.startswith(_STANDARD) or not _FOLDERS.isdisjoint(Path(file).parts)
