"""Functions that read the values of settings. Each returns the value, or raises SettingsError."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

from fedexec.errors import SettingsError

__all__ = [
    "AUTO",
    "LARGEST",
    "address",
    "at_least_one",
    "backend_name",
    "device",
    "log_level",
    "modules",
    "not_negative",
    "seconds",
    "start_method",
    "switch",
    "workers",
]

AUTO = "auto"
START_METHODS = ("forkserver", "spawn")
LARGEST = 2**64 - 1


def _whole(minimum: int, complaint: str) -> Callable[[Any], int]:
    """Return a function that reads a whole number; the complaint is for numbers below the minimum."""

    def read(value: Any) -> int:
        try:
            number = int(value) if isinstance(value, str) else value
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError
        except (ValueError, TypeError):
            raise SettingsError(f"must be a whole number, got {value!r}") from None
        if number < minimum:
            raise SettingsError(f"{complaint}, got {number}")
        if number > LARGEST:
            raise SettingsError(f"must be at most {LARGEST}, got {number}")
        return number

    return read


at_least_one = _whole(1, "must be greater than 0")
not_negative = _whole(0, "must not be negative")


def workers(value: object) -> int | str:
    """Read a number of workers, at least 1, or ``"auto"``."""
    return AUTO if value == AUTO else at_least_one(value)


def device(value: object) -> str:
    """Read a choice of devices."""
    if not isinstance(value, str):
        raise SettingsError(f"must be a string, got {value!r}")
    return value.strip()


def address(value: object) -> str:
    """Read the address of a cluster."""
    if not isinstance(value, str) or not value:
        raise SettingsError(f"must be the address of a cluster, got {value!r}")
    return value


def seconds(value: Any) -> float:
    """Read a time in seconds, greater than 0."""
    try:
        number = float(value)
    except (ValueError, TypeError):
        raise SettingsError(f"must be a number of seconds, got {value!r}") from None
    if not 0 < number < float("inf"):
        raise SettingsError(f"must be greater than 0 seconds and finite, got {value!r}")
    return number


def modules(value: str | Iterable[str]) -> tuple[str, ...]:
    """Read names of modules: an iterable, or a string with commas."""
    try:
        names = [name.strip() for name in (value.split(",") if isinstance(value, str) else value)]
    except (AttributeError, TypeError):
        raise SettingsError(f"must be names of modules, got {value!r}") from None
    return tuple(name for name in names if name)


def start_method(value: object) -> str:
    """Read the name of a start method."""
    if value not in START_METHODS:
        raise SettingsError(f"must be one of {', '.join(START_METHODS)}, got {value!r}")
    return str(value)


def log_level(value: object) -> str:
    """Read the name of a level of logging."""
    level = str(value).upper()
    if level not in logging.getLevelNamesMapping():
        raise SettingsError(f"must be DEBUG, INFO, WARNING or ERROR, got {value!r}")
    return level


def switch(value: Any) -> bool:
    """Read a truth value: a bool, or a word such as ``"yes"``."""
    if isinstance(value, bool):
        return value
    try:
        return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
    except (AttributeError, KeyError):
        raise SettingsError(f"must be true or false, got {value!r}") from None


def backend_name(value: object) -> str:
    """Read the name of a backend."""
    if not isinstance(value, str) or not value.strip():
        raise SettingsError(f"must be the name of a backend, got {value!r}")
    return value.strip()
