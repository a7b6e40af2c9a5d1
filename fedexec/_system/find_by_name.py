"""What ``"module:attribute"`` names: backends, apps and tasks are written so, and imported when used."""

import functools
from importlib import import_module
from typing import Any

__all__ = ["find_attribute", "split_name"]


def split_name(name: str) -> tuple[str, str]:
    """Take ``"package.module:attribute"`` apart.

    Raises
    ------
    ValueError
        It is not written like that.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} is not written like package.module:attribute")
    return module, attribute


def find_attribute(module: str, attribute: str) -> Any:
    """Import a module and return what it calls `attribute`.

    Parameters
    ----------
    module : str
        Its whole name.
    attribute : str
        A name, or several with dots: ``"Class.method"``.

    Raises
    ------
    ImportError, AttributeError
        There is no such module, or no such attribute.
    Exception
        Whatever the module raises while it is imported.
    """
    return functools.reduce(getattr, attribute.split("."), import_module(module))
