"""Functions and classes that the suites run in workers; they can be imported there, and import little."""

import ctypes
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import PicklingError, UnpicklingError
from typing import Any, NoReturn

DEADLINE = 30.0
"""Seconds after which a test gives up."""


def poll(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Wait until `condition` returns a true value, and return it; raise AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)
    return value


@dataclass(frozen=True)
class Gate:
    """A directory at which tasks wait, in any process, until the test opens it.

    Attributes
    ----------
    directory : Path
    """

    directory: Path

    def enter(self, value: Any = None) -> Any:
        """Note the arrival of this task, wait until the gate is open, and return `value`; called by tasks."""
        note = self.directory / f".{uuid.uuid4()}"
        note.write_text(str(os.getpid()))
        note.rename(self.directory / f"at-{uuid.uuid4()}")
        self.wait_until_open()
        return value

    def wait_until_open(self) -> None:
        """Wait without noting the arrival."""
        poll((self.directory / "open").exists, "the gate was opened")

    def open(self) -> None:
        """Let all tasks pass."""
        (self.directory / "open").touch()

    def arrived(self) -> list[int]:
        """Return the pids of the tasks that have arrived."""
        return [int(note.read_text()) for note in self.directory.glob("at-*")]

    def wait_for(self, number: int) -> list[int]:
        """Wait until `number` tasks have arrived."""
        poll(lambda: len(self.arrived()) >= number, f"{number} tasks started")
        return self.arrived()


# ---------------------------------------------------------------- answers


def add(x: int, y: int) -> int:
    """Return the sum."""
    return x + y


def capture(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of the call."""
    return args, kwargs


def raise_(error: BaseException) -> NoReturn:
    """Raise `error`."""
    raise error


def capture_and_fail(*args: Any) -> NoReturn:
    """Raise an exception whose frame holds `args`."""
    raise ValueError


def fail_in_the_worker() -> NoReturn:
    """Raise an error whose source line can be searched for."""
    raise LookupError("from the worker")  # this very line


def exit_with(code: int) -> NoReturn:
    """Call sys.exit."""
    sys.exit(code)


def make(cls: Callable[[], Any]) -> Any:
    """Return an instance of `cls`."""
    return cls()


def raise_new(cls: Callable[[], BaseException]) -> NoReturn:
    """Raise an instance of `cls`."""
    raise cls()


def pid_after(gate: Gate) -> int:
    """Return this process's pid once the gate is open."""
    gate.enter()
    return os.getpid()


def enter_if(gate: Gate, condition: bool) -> bool:
    """Wait at the gate only if `condition` is true."""
    if condition:
        gate.enter()
    return condition


def print_line(value: Any) -> None:
    """Print after a pause, when the caller has reached its end."""
    time.sleep(0.1)
    sys.stdout.write(f"{value}\n")  # in one write
    sys.stdout.flush()


def environment(*names: str) -> list[str | None]:
    """Return environment variables of the worker."""
    return [os.environ.get(name) for name in names]


class Plain:
    """An object that supports weak references."""

    def method(self) -> None:
        """Do nothing."""

    def __call__(self, *args: object) -> "Plain":
        return Plain()


def make_plain(_: object) -> Plain:
    """Return a new object."""
    return Plain()


# ---------------------------------------------------------------- set-up of a worker

_state: dict[str, Any] = {}


def initialize(value: Any) -> None:
    """Store `value` for :func:`initialized`."""
    _state["value"] = value


def initialized() -> Any:
    """Return the argument of :func:`initialize`."""
    return _state.get("value")


def fail_after(gate: Gate) -> NoReturn:
    """Raise once the gate is open; this is an initializer."""
    gate.wait_until_open()
    raise ValueError("the initializer failed")


# ---------------------------------------------------------------- exceptions


class FalsyByBool(Exception):
    """An exception that is false."""

    def __bool__(self) -> bool:
        return False


class FalsyByLength(Exception):
    """An exception that is empty."""

    def __len__(self) -> int:
        return 0


class RefusesToUnpickle(Exception):
    """An exception that can be pickled but not unpickled, because it gives the wrong number of arguments."""

    def __init__(self, number: int, place: str) -> None:
        super().__init__(f"{number} at {place}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


class OddError(OSError):
    """An exception whose arguments differ from those of its base; one of them is keyword-only."""

    def __init__(self, path: str, *, extra: object) -> None:
        super().__init__(2, "there is none", path)
        self.extra = extra


class NeedsTwoArguments(Exception):
    """An exception whose arguments differ from its ``args``, so Python cannot unpickle it."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"{code} at {where}")


class OfTwoKinds(NeedsTwoArguments, MemoryError):
    """It has two built-in bases, of which only one can make the object."""


class HoldsLock(Exception):
    """An exception that cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


# ---------------------------------------------------------------- trouble with pickle


def segfault() -> None:
    """Read address 0."""
    ctypes.string_at(0)


class ErrorAtPickle:
    """Raises when it is pickled."""

    def __reduce__(self) -> NoReturn:
        raise PicklingError("error in pickle")


class ExitAtPickle:
    """Calls sys.exit when it is pickled."""

    def __reduce__(self) -> NoReturn:
        sys.exit(1)


class CrashAtPickle:
    """Ends the process when it is pickled."""

    def __reduce__(self) -> NoReturn:
        segfault()
        raise AssertionError("unreachable")


def _unpickling_error() -> NoReturn:
    raise UnpicklingError("error in unpickle")


class ErrorAtUnpickle:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickling_error, ()


class ExitAtUnpickle:
    """Calls sys.exit when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exit_with, (1,)


class CrashAtUnpickle:
    """Ends the process when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return segfault, ()
