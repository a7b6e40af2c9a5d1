"""What a file of others may hold: every fault is a ValueError that names the place and what stands there."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

__all__ = [
    "AMOUNT",
    "COUNT",
    "FLAG",
    "NUMBER",
    "SECONDS",
    "TEXT",
    "TEXTS",
    "Kind",
    "check",
    "list_of",
    "load",
    "mapping_of",
    "optional",
]

DEEPEST = 32
LARGEST = 2.0**64
MOST, MOST_BYTES, MOST_THINGS = 1e12, 2**53, 10**9
SHOWN = 60  # characters of what is wrong


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value has to be.

    Attributes
    ----------
    name : str
        In words, as in "is no number".
    holds : callable
        Whether a value is one.
    """

    name: str
    holds: Callable[[object], bool]


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST


def _is_whole(most: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
NUMBER = Kind("number", _is_number)
SECONDS = Kind("number of seconds", lambda value: _is_number(value) and value >= 0)
COUNT = Kind("count", _is_whole(MOST_THINGS))
AMOUNT = Kind("number of bytes", _is_whole(MOST_BYTES))


def optional(kind: Kind) -> Kind:
    """Let a value be missing."""
    return Kind(kind.name, lambda value: value is None or kind.holds(value))


def list_of(kind: Kind) -> Kind:
    """Have a list of values."""
    return Kind(
        f"list, each a {kind.name}", lambda value: isinstance(value, list) and all(map(kind.holds, value))
    )


def mapping_of(kind: Kind) -> Kind:
    """Have values under names."""
    return Kind(
        f"mapping of names, each to a {kind.name}",
        lambda value: isinstance(value, dict) and all(map(kind.holds, value.values())),
    )


TEXTS = mapping_of(TEXT)


def check(content: Mapping[str, object], kinds: Mapping[str, Kind], place: str = "") -> None:
    """Hold what stands under some names, as far as it is there, to their kinds.

    Raises
    ------
    ValueError
    """
    for name, kind in kinds.items():
        if name in content and not kind.holds(content[name]):
            where = f"{place}.{name}" if place else name
            raise ValueError(f"{where}: {_short(content[name])} is no {kind.name}")


def load(text: str) -> Any:
    """Read JSON whose numbers are numbers, whose text is text, and that is not nested for its own sake.

    Raises
    ------
    ValueError
    """
    try:
        content = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST}") from None
    except ValueError as exc:
        raise ValueError(f"that is no JSON: {exc}") from exc
    waiting: list[tuple[tuple[str, ...], object]] = [((), content)]
    while waiting:
        place, value = waiting.pop()
        where = "".join(place).removeprefix(".")
        if len(place) > DEEPEST:
            raise ValueError(f"{where[:SHOWN]}...: it is nested deeper than {DEEPEST}")
        if isinstance(value, float | int) and not abs(value) <= LARGEST:
            reason = "too large" if math.isfinite(value) else "no number"
            raise ValueError(f"{where}: {_short(value)} is {reason}")
        if isinstance(value, str):
            _check_text(where, [value])
        elif isinstance(value, dict):
            _check_text(where, value)
            waiting += [((*place, f".{name}"), each) for name, each in value.items()]
        elif isinstance(value, list):
            waiting += [((*place, f"[{index}]"), each) for index, each in enumerate(value)]
    return content


def _whole(digits: str) -> int | float:
    """Read a whole number; one of thousands of digits is as good as one without end."""
    return int(digits) if len(digits) < 25 else float(digits)


def _check_text(where: str, found: Iterable[str]) -> None:
    for text in found:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{where}: {ascii(text)[:SHOWN]} is no text") from None


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}..."
