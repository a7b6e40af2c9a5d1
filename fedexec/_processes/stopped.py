"""How long we wait for a process that is stopped (SIGSTOP, a debugger, a terminal): it answers nobody.

Only processes of ours that others wait for are treated so, and ended: a template, a Manager, a worker that
has not begun its task. A task that somebody stops is waited for, up to its deadline.
"""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any

import psutil

__all__ = ["await_answer", "await_reader", "is_stopped", "kill_if_stopped", "start_watching"]

_LOOKS, _SECONDS = 2, 1.0  # It is stopped for good if so many looks, so many seconds apart, find it stopped.
_PIPE_BYTES = 4096  # Any empty pipe takes so much, and nobody waits for its reader.


def await_answer(objects: list[Any], pid: int | None, seconds: float = math.inf) -> list[Any]:
    """Wait until something can be read.

    Parameters
    ----------
    objects : list
        Descriptors, connections, sentinels.
    pid : int or None
        The process that is to answer.
    seconds : float, optional
        To wait at most.

    Returns
    -------
    list
        Those that can be read; none if the process stays stopped, or the time is over.
    """
    found, end = 0, time.monotonic() + seconds
    while not (ready := wait(objects, max(0.0, min(_SECONDS, end - time.monotonic())))):
        found = found + 1 if is_stopped(pid) else 0
        if found == _LOOKS or time.monotonic() >= end:
            return []
    return ready


@contextlib.contextmanager
def await_reader(pid: int | None, size: int) -> Iterator[None]:
    """Kill a process that stays stopped while this one writes to it: then the write fails, and waits no more.

    Parameters
    ----------
    pid : int or None
        The process that is to read, and has not ended; None if it is not known.
    size : int
        Bytes that are to be written.
    """
    if pid is None or size <= _PIPE_BYTES:
        yield
        return
    is_written = threading.Event()
    watching = kill_if_stopped(pid, is_written)
    try:
        yield
    finally:
        is_written.set()
        if watching is not None:
            watching.join()


def kill_if_stopped(pid: int, is_over: threading.Event) -> threading.Thread | None:
    """Start a thread that kills a process that stays stopped, until `is_over` is set, if one can be."""

    def watch() -> None:
        found = 0
        while not is_over.wait(_SECONDS):
            found = found + 1 if is_stopped(pid) else 0
            if found == _LOOKS:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return

    return start_watching(watch, "fedexec-watch-stopped")


def start_watching(watch: Callable[[], None], name: str) -> threading.Thread | None:
    """Start a thread that looks after a process; None where it cannot be started.

    CPython 3.12.0 to 3.12.2 start no thread once the main thread has ended (gh-113964). A process that is
    stopped just then is waited for; tasks that were submitted before are done all the same.
    """
    watching = threading.Thread(target=watch, name=name, daemon=True)
    try:
        watching.start()
    except RuntimeError:
        return None
    return watching


def is_stopped(pid: int | None) -> bool:
    """Return whether a process lives, and does not run until it is told to continue."""
    try:
        return pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
