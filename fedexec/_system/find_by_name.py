"""Finds what ``"module:attribute"`` names: a backend, an app or a task, which is imported when it is used."""

import functools
from importlib import import_module
from typing import Any

__all__ = ["find_attribute", "split_name"]


def split_name(name: str) -> tuple[str, str]:
    """Split ``"package.module:attribute"`` into module and attribute.

    Parameters
    ----------
    name : str

    Returns
    -------
    tuple of (str, str)

    Raises
    ------
    ValueError
        The name does not have this form.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} is not written like package.module:attribute")
    return module, attribute


def find_attribute(module: str, attribute: str) -> Any:
    """Import a module and return one of its attributes.

    Parameters
    ----------
    module : str
        Full name of the module.
    attribute : str
        Name of the attribute, possibly with dots: ``"Class.method"``.

    Returns
    -------
    object

    Raises
    ------
    ImportError, AttributeError
        The module or the attribute does not exist.
    Exception
        Whatever the module raises while it is imported.
    """
    return functools.reduce(getattr, attribute.split("."), import_module(module))
