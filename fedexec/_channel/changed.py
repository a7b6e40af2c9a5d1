"""What workers must be told because it has changed after they were started."""

from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["Changed"]

T = TypeVar("T")


class Changed(Generic[T]):
    """A value of this process that workers take over when they are started.

    Parameters
    ----------
    read : callable
        Returns the value of now.
    """

    def __init__(self, read: Callable[[], T]) -> None:
        self._read = read
        self._first = read()
        self._has_changed = False

    def value(self) -> T | None:
        """Return the value if it has ever changed; else None."""
        now = self._read()
        if now != self._first:
            self._has_changed = True  # reused workers must also be told when the value changes back
        return now if self._has_changed else None
