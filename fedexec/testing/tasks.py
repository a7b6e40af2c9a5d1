"""Functions and classes the suites run in workers; importable there, and light."""

import concurrent.futures
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from pickle import PicklingError, UnpicklingError
from typing import Any, NoReturn

from fedexec._worker import ending, seeding

DEADLINE = 30.0
"""Seconds after which a test gives up on something that should long have happened."""


def poll(condition: Callable[[], Any], what: str, seconds: float = DEADLINE) -> Any:
    """Wait until `condition` returns something true, and return that; AssertionError when it never does."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.005)
    return value


@dataclass(frozen=True)
class Gate:
    """A directory at which tasks wait, in whatever process they are, until the test opens it.

    Attributes
    ----------
    directory : Path
    """

    directory: Path

    def enter(self, value: Any = None) -> Any:
        """Say that we are here, wait until the gate is open, return `value`. For tasks."""
        note = self.directory / f".{uuid.uuid4()}"
        note.write_text(str(os.getpid()))
        note.rename(self.directory / f"at-{uuid.uuid4()}")
        self.wait_until_open()
        return value

    def wait_until_open(self) -> None:
        """Wait without saying so."""
        poll((self.directory / "open").exists, "the gate was opened")

    def open(self) -> None:
        """Let everybody pass."""
        (self.directory / "open").touch()

    def arrived(self) -> list[int]:
        """Return the process ids of those who have come."""
        return [int(note.read_text()) for note in self.directory.glob("at-*")]

    def wait_for(self, number: int) -> list[int]:
        """Wait until `number` tasks have come."""
        poll(lambda: len(self.arrived()) >= number, f"{number} tasks started")
        return self.arrived()


# ---------------------------------------------------------------- answers


def add(x: int, y: int) -> int:
    """Return the sum."""
    return x + y


def capture(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what it was called with."""
    return args, kwargs


def raise_(error: BaseException) -> NoReturn:
    """Raise `error`."""
    raise error


def capture_and_fail(*args: Any) -> NoReturn:
    """Raise, with `args` in the frame."""
    raise ValueError


def fail_in_the_worker() -> NoReturn:
    """Raise an error whose source line can be looked for."""
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
    """Return the process's id, once the gate is open."""
    gate.enter()
    return os.getpid()


def enter_if(gate: Gate, condition: bool) -> bool:
    """Wait at the gate only if `condition`."""
    if condition:
        gate.enter()
    return condition


def print_line(value: Any) -> None:
    """Print, late enough for the caller to have come to its end."""
    time.sleep(0.1)
    sys.stdout.write(f"{value}\n")  # in one piece
    sys.stdout.flush()


def environment(*names: str) -> list[str | None]:
    """Return variables of the worker."""
    return [os.environ.get(name) for name in names]


class Plain:
    """An object that can be referred to weakly."""

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
    """Leave `value` for :func:`initialized`."""
    _state["value"] = value


def initialized() -> Any:
    """Return what :func:`initialize` was given."""
    return _state.get("value")


def fail_after(gate: Gate) -> NoReturn:
    """Raise, once the gate is open. An initializer."""
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
    """Pickles, and then takes other arguments than it says."""

    def __init__(self, number: int, place: str) -> None:
        super().__init__(f"{number} at {place}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.args


class OddError(OSError):
    """Takes other arguments than its base, one of them by name only."""

    def __init__(self, path: str, *, extra: object) -> None:
        super().__init__(2, "there is none", path)
        self.extra = extra


class NeedsTwoArguments(Exception):
    """Takes other arguments than it has in ``args``, so Python cannot unpickle it."""

    def __init__(self, code: int, where: str) -> None:
        super().__init__(f"{code} at {where}")


class HoldsLock(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


# ---------------------------------------------------------------- trouble with pickle


def segfault() -> None:
    """Read address 0."""
    ctypes.string_at(0)


class ErrorAtPickle:
    """Raises when pickled."""

    def __reduce__(self) -> NoReturn:
        raise PicklingError("error in pickle")


class ExitAtPickle:
    """Calls sys.exit when pickled."""

    def __reduce__(self) -> NoReturn:
        sys.exit(1)


class CrashAtPickle:
    """Ends the process when pickled."""

    def __reduce__(self) -> NoReturn:
        segfault()
        raise AssertionError("unreachable")


def _unpickling_error() -> NoReturn:
    raise UnpicklingError("error in unpickle")


class ErrorAtUnpickle:
    """Raises when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickling_error, ()


class ExitAtUnpickle:
    """Calls sys.exit when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exit_with, (1,)


class CrashAtUnpickle:
    """Ends the process when unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return segfault, ()


# ---------------------------------------------------------------- deaths


def kill_self(number: int = signal.SIGKILL) -> NoReturn:
    """End this process by a signal."""
    os.kill(os.getpid(), number)
    signal.pause()
    raise AssertionError("unreachable")


def kill_self_with(data: bytes) -> NoReturn:
    """End this process by a signal; `data` is what travels here."""
    kill_self()


def die_answering() -> bytes:
    """Return what will end this process by SIGKILL when a part of it has been sent."""
    answer = os.urandom(1 << 17)  # more than a pipe takes at once
    send = Connection._send_bytes  # type: ignore[attr-defined]

    def send_a_part(self: Connection, buffer: memoryview) -> None:
        if len(buffer) < len(answer):
            send(self, buffer)
        else:
            os.write(self.fileno(), len(buffer).to_bytes(4, "big") + buffer[: 1 << 14])
            kill_self()

    Connection._send_bytes = send_a_part  # type: ignore[attr-defined]
    return answer


def die_at(gate: Gate) -> None:
    """End this process by SIGKILL, once the gate is open."""
    gate.enter()
    kill_self()


def die_once(marker: Path) -> int:
    """Die at the first call, return the number of earlier calls at the next."""
    if marker.exists():
        return len(marker.read_text())
    marker.write_text("x")
    os._exit(3)


def die_always(marker: Path) -> NoReturn:
    """Count the call, then die."""
    with marker.open("a") as file:
        file.write("x")
    os._exit(3)


def hang() -> NoReturn:
    """Never return."""
    while True:
        signal.pause() if threading.current_thread() is threading.main_thread() else time.sleep(1000)


def hang_for_good() -> NoReturn:
    """Never return, and take no notice of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang()


def complain(count: int) -> None:
    """Write to stderr."""
    for number in range(count):
        print("complaint", number, file=sys.stderr)


def complain_and_die(count: int) -> NoReturn:
    """Write to stderr, then die."""
    complain(count)
    kill_self()


def silence_stderr() -> None:
    """Put another file in its place, for good."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def leave_behind(count: int) -> list[int]:
    """Start processes that nobody waits for; return their ids."""
    return [subprocess.Popen(["sleep", "1000"]).pid for _ in range(count)]


def hang_with_grandchild(note: Path) -> NoReturn:
    """Start a process, write its id to `note`, never return."""
    child = subprocess.Popen(["sleep", "1000"])
    draft = note.with_suffix(".draft")
    draft.write_text(str(child.pid))
    draft.rename(note)
    hang()


# ---------------------------------------------------------------- memory

_leaked: list[bytearray] = []


def resident() -> int:
    """Return the resident set of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def leak(size: int, value: Any = None) -> tuple[Any, int, int]:
    """Keep `size` bytes for ever; return `value`, the process id and the resident set at the start."""
    before = resident()
    _leaked.append(bytearray(b"x") * size)
    return value, os.getpid(), before


def leak_and_fail(size: int) -> NoReturn:
    """Keep `size` bytes for ever, then raise."""
    leak(size)
    raise ValueError("leaked")


def allocate(size: int) -> int:
    """Hold `size` bytes for a moment; return the resident set meanwhile."""
    data = bytearray(b"x") * size
    held = resident()
    del data
    return held


def hurry_to_leave(seconds: float) -> None:
    """Give this worker less time to end; an initializer."""
    ending.LEAVE_SECONDS = seconds


def leave_a_thread() -> int:
    """Leave a thread that never ends, and that an interpreter would wait for."""
    thread = threading.Thread(target=time.sleep, args=(3600,))
    thread.start()
    return thread.native_id or 0


def leave_a_pool() -> int:
    """Leave the processes of a multiprocessing.Pool waiting."""
    pool = multiprocessing.get_context("fork").Pool(1)
    _left.append(pool)
    return int(pool.apply(os.getpid))


def leave_an_executor() -> int:
    """Leave the process of a ProcessPoolExecutor at work."""
    executor = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork"))
    _left.append(executor)
    pid = executor.submit(os.getpid).result()
    executor.submit(time.sleep, 3600)
    return pid


def leave_a_process() -> int:
    """Leave a process that never ends, and that multiprocessing would wait for."""
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,))
    child.start()
    return child.pid or 0


_left: list[Any] = []


def draw() -> tuple[float, float]:
    """Draw from Python's generator and from numpy's, which may have to be imported for it."""
    import random

    import numpy.random

    return random.random(), float(numpy.random.rand())


class DrawsAtUnpickle:
    """Unpickling it draws a random number."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return draw, ()


def drawn_by_the_first_task_of(seed: int) -> tuple[float, float]:
    """Return what :func:`draw` returns in the first task of any executor with a seed."""
    import random

    import numpy as np

    derived = seeding.derive(seed, 0)
    return random.Random(derived).random(), float(np.random.RandomState(derived % 2**32).rand())


def draw_with(_: object) -> tuple[float, float]:
    """Draw, whatever the argument is."""
    return draw()


def draw_after_death(marker: Path) -> tuple[float, float]:
    """Draw, and die at the first call before that is told."""
    drawn = draw()
    die_once(marker)
    return drawn


def write_later(path: str) -> None:
    """Have a thread finish a file after the task is done."""

    def write() -> None:
        time.sleep(0.3)
        Path(path).write_text("whole")

    threading.Thread(target=write).start()


def end_child_that_handles_sigterm() -> int | None:
    """Return the exit code of a forked child that exits with 7 when SIGTERM comes."""
    return end_child(_exit_on_sigterm)


def end_child(run: Callable[[Connection], object]) -> int | None:
    """Fork a process that says when it is ready, end it as a pool ends its own, and return its exit code."""
    context = multiprocessing.get_context("fork")
    ready, is_ready = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(is_ready,))
    child.start()
    ready.recv()
    child.terminate()
    child.join()
    return child.exitcode


def _exit_on_sigterm(is_ready: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(7))
    is_ready.send(True)
    while True:  # A signal that comes just before a sleep begins is handled when that sleep is over.
        time.sleep(0.05)
