"""What the benchmarks run in workers. Imports nothing, so that a worker's start is not charged with it."""

from typing import TypeVar

T = TypeVar("T")


def nothing() -> None:
    """Do nothing."""


def give_back(value: T) -> T:
    """Return the argument."""
    return value
