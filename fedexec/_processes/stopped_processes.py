"""Waiting for processes that may be stopped (by SIGSTOP, a debugger, a terminal) and then do not answer.

Such a process is ended only if it belongs to fedexec and other processes wait for it: a template, a Manager,
a worker that has not begun its task. A task that a user stops is waited for until its deadline.
"""

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

__all__ = ["await_answer", "await_reader", "is_stopped", "kill_if_stopped", "start_watching"]

_LOOKS, _SECONDS = 2, 1.0  # A process counts as stopped if this many looks, this far apart, find it stopped.
_PIPE_BYTES = 4096  # Any empty pipe holds this much, so the writer does not wait for the reader.


def await_answer(
    objects: Sequence[Connection | socket.socket | int], pid: int | None, seconds: float = math.inf
) -> Sequence[object]:
    """Wait until something can be read.

    Parameters
    ----------
    objects : sequence
        Descriptors, connections, sentinels.
    pid : int or None
        The process that is to answer.
    seconds : float, optional
        The longest time to wait.

    Returns
    -------
    sequence
        The objects that can be read; empty if the process stays stopped, or the time is over.
    """
    stopped_looks, end = 0, time.monotonic() + seconds
    while not (ready := wait(objects, max(0.0, min(_SECONDS, end - time.monotonic())))):
        stopped_looks = stopped_looks + 1 if is_stopped(pid) else 0
        if stopped_looks == _LOOKS or time.monotonic() >= end:
            return []
    return ready


@contextlib.contextmanager
def await_reader(pid: int | None, size: int) -> Iterator[None]:
    """Kill a process that stays stopped while this process writes to it, so that the write fails and ends.

    Parameters
    ----------
    pid : int or None
        The process that is to read and has not been reaped; None if it is unknown.
    size : int
        Number of bytes to write.

    Yields
    ------
    None
    """
    if pid is None or size <= _PIPE_BYTES:
        yield
        return
    is_written = threading.Event()
    watcher = kill_if_stopped(pid, is_written)
    try:
        yield
    finally:
        is_written.set()
        if watcher is not None:
            watcher.join()


def kill_if_stopped(pid: int, is_over: threading.Event) -> threading.Thread | None:
    """Start a thread that kills a process if it stays stopped, until `is_over` is set.

    Parameters
    ----------
    pid : int
    is_over : threading.Event
        Ends the thread.

    Returns
    -------
    threading.Thread or None
        None if no thread can be started; see :func:`start_watching`.
    """

    def watch() -> None:
        stopped_looks = 0
        while not is_over.wait(_SECONDS):
            stopped_looks = stopped_looks + 1 if is_stopped(pid) else 0
            if stopped_looks == _LOOKS:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                return

    return start_watching(watch, "fedexec-watch-stopped")


def start_watching(watch: Callable[[], None], name: str) -> threading.Thread | None:
    """Start a thread that watches a process.

    CPython 3.12.0 to 3.12.2 start no thread once the main thread has ended (gh-113964). A process that is
    stopped at that time is waited for; tasks that were submitted before are done all the same.

    Parameters
    ----------
    watch : callable
        The thread's function.
    name : str
        The thread's name.

    Returns
    -------
    threading.Thread or None
        None if no thread can be started.
    """
    watcher = threading.Thread(target=watch, name=name, daemon=True)
    try:
        watcher.start()
    except RuntimeError:
        return None
    return watcher


def is_stopped(pid: int | None) -> bool:
    """Return whether a process is alive but stopped.

    Parameters
    ----------
    pid : int or None

    Returns
    -------
    bool
        False if `pid` is None or the process cannot be examined.
    """
    import psutil

    try:
        return pid is not None and psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
