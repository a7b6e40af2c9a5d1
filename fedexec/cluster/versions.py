"""The versions that a caller and its nodes should have in common."""

import logging
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from fedexec.interface import Node

__all__ = ["check_versions", "differences", "versions"]

log = logging.getLogger("fedexec")

_PACKAGES = ("fedexec", "cloudpickle", "numpy", "torch")
_SAME = {"python", "fedexec"}  # otherwise neither code nor messages can be exchanged


def versions() -> dict[str, str]:
    """Return the versions of Python, and of the packages that pickled tasks depend on, in this process."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> dict[str, str]:
    """Return what differs between two machines.

    Parameters
    ----------
    here, there : mapping of str to str
        Versions, as :func:`versions` returns them.

    Returns
    -------
    dict of str to str
        Name -> text. Patch releases of Python do not differ, because code and pickles are the same.
    """
    found = {}
    for name in sorted({*here, *there}):
        ours, theirs = here.get(name, "none"), there.get(name, "none")
        if name == "python":
            ours, theirs = (".".join(each.split(".")[:2]) for each in (ours, theirs))
        if ours != theirs:
            found[name] = f"{name} {theirs} (here {ours})"
    return found


def check_versions(node: Node, name: str) -> None:
    """Refuse a node with which this process cannot exchange tasks, and warn of other differences.

    Parameters
    ----------
    node : Node
    name : str
        Name of the node for messages.

    Raises
    ------
    ConnectionError
        Python or fedexec differ.
    """
    found = differences(versions(), node.versions)
    text = ", ".join(found.values())
    if _SAME & set(found):
        raise ConnectionError(f"it has other versions than this process: {text}")
    if found:
        log.warning("node %s has other versions than this process: %s", name, text)
