"""Tasks that die, hang, leak, or leave something behind; every worker can import them."""

import concurrent.futures
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import psutil

from fedexec._worker import ending, seeding
from fedexec.testing.tasks import Gate

# ---------------------------------------------------------------- deaths


def kill_self(number: int = signal.SIGKILL) -> NoReturn:
    """End this process by a signal."""
    os.kill(os.getpid(), number)
    signal.pause()
    raise AssertionError("unreachable")


def kill_self_with(data: bytes) -> NoReturn:
    """End this process by SIGKILL; `data` only makes the task's message large."""
    kill_self()


def die_answering() -> bytes:
    """Return an answer that ends this process by SIGKILL when a part of it has been sent."""
    answer = os.urandom(1 << 17)  # more than a pipe holds
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
    """End this process by SIGKILL once the gate is open."""
    gate.enter()
    kill_self()


def die_once(marker: Path) -> int:
    """Die in the first call; in the next call, return the number of earlier calls."""
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
    """Never return, and ignore SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    hang()


def clean_up_on_sigterm(begun: Path, cleaned_up: Path) -> None:
    """Create the file `begun`, and `cleaned_up` when SIGTERM comes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        begun.touch()
        hang()
    finally:
        cleaned_up.touch()


def complain(count: int) -> None:
    """Write `count` lines to stderr."""
    for number in range(count):
        print("complaint", number, file=sys.stderr)


def complain_and_die(count: int) -> NoReturn:
    """Write `count` lines to stderr, then die."""
    complain(count)
    kill_self()


def silence_stderr() -> None:
    """Replace stderr by /dev/null for the rest of the process."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def leave_behind(count: int) -> list[int]:
    """Start processes without waiting for them; return their pids."""
    return [subprocess.Popen(["sleep", "1000"]).pid for _ in range(count)]


def hang_with_grandchild(note: Path) -> NoReturn:
    """Start a process, write its pid to `note`, and never return."""
    child = subprocess.Popen(["sleep", "1000"])
    draft = note.with_suffix(".draft")
    draft.write_text(str(child.pid))
    draft.rename(note)
    hang()


# ---------------------------------------------------------------- memory

_leaked: list[bytearray] = []


def resident() -> int:
    """Return the resident set of this process in bytes."""
    return int(psutil.Process().memory_info().rss)


def leak(size: int, value: Any = None) -> tuple[Any, int, int]:
    """Keep `size` bytes for ever; return `value`, the pid and the resident set in bytes at the start."""
    before = resident()
    _leaked.append(bytearray(b"x") * size)
    return value, os.getpid(), before


def leak_and_fail(size: int) -> NoReturn:
    """Keep `size` bytes for ever, then raise."""
    leak(size)
    raise ValueError("leaked")


def allocate(size: int) -> int:
    """Hold `size` bytes for a moment; return the resident set at that moment."""
    data = bytearray(b"x") * size
    held = resident()
    del data
    return held


def hurry_to_leave(seconds: float) -> None:
    """Give this worker only `seconds` to end; this is an initializer."""
    ending.LEAVE_SECONDS = seconds


def leave_a_thread() -> int:
    """Leave a thread that never ends, and that the interpreter would wait for."""
    thread = threading.Thread(target=time.sleep, args=(3600,))
    thread.start()
    return thread.native_id or 0


def leave_a_pool() -> int:
    """Leave the waiting process of a multiprocessing.Pool."""
    pool = multiprocessing.get_context("fork").Pool(1)
    _left.append(pool)
    return int(pool.apply(os.getpid))


def leave_an_executor() -> int:
    """Leave the working process of a ProcessPoolExecutor."""
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
    """Draw from Python's generator and from numpy's, which may have to be imported first."""
    import random

    import numpy.random

    return random.random(), float(numpy.random.rand())


class DrawsAtUnpickle:
    """Draws a random number when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return draw, ()


def drawn_by_the_first_task_of(seed: int) -> tuple[float, float]:
    """Return what :func:`draw` returns in the first task of any executor with this seed."""
    import random

    import numpy as np

    derived = seeding.derive(seed, 0)
    return random.Random(derived).random(), float(np.random.RandomState(derived % 2**32).rand())


def draw_in_an_executor() -> tuple[float, float]:
    """Draw in a task of an executor that this task makes."""
    from fedexec.create import create_executor

    with create_executor(max_workers=1) as executor:
        return executor.submit(draw).result()


def draw_with(_: object) -> tuple[float, float]:
    """Draw, and ignore the argument."""
    return draw()


def draw_after_death(marker: Path) -> tuple[float, float]:
    """Draw; in the first call, die before the result is returned."""
    numbers = draw()
    die_once(marker)
    return numbers


def write_later(path: str) -> None:
    """Let a thread finish a file after the task is done."""

    def write() -> None:
        time.sleep(0.3)
        Path(path).write_text("whole")

    threading.Thread(target=write).start()


def end_child_that_handles_sigterm() -> int | None:
    """Return the exit code of a forked child that handles SIGTERM by exiting with 7."""
    return end_child(_exit_on_sigterm)


def end_child(run: Callable[[Connection], object]) -> int | None:
    """Fork a process that reports readiness, end it as a pool ends its workers, and return its exit code."""
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
    while True:  # A signal just before a sleep begins is handled only when that sleep is over.
        time.sleep(0.05)
