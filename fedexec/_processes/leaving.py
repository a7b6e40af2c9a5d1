"""How a template and its workers leave: what imports have left to be done at exit is done once.

That is in the process that has imported. A worker, and a successor, do what was left since their fork.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import time
import weakref
from multiprocessing import process, util
from typing import Any

import psutil

__all__ = [
    "ToDoAtExit",
    "continue_without_parent",
    "end_group",
    "end_what_is_left",
    "end_with_parent",
    "has_ended",
    "leave_out_inherited",
]

_util: Any = util  # its underscored names, which type checkers do not know
_process: Any = process
_finalize: Any = weakref.finalize
REST_SECONDS = 0.5  # that a process which an import has started may take to end, once it was told to
MOST_FILES = 1 << 20  # descriptors that a process may have open by default, at most
POLL_SECONDS = 0.01
_PR_SET_PDEATHSIG = 1

exit_code = 0  # of a worker whose exit functions are all that is left to do


class ToDoAtExit:
    """What imports have left to be done at exit: this process does it at its end, and no worker does.

    atexit's own list cannot be read or put aside: see :func:`leave_out_inherited`.
    """

    def __init__(self) -> None:
        # weakref tells no one what is to be finalized. In workers it is still, but not at exit.
        self._finalizers = [each for each in list(_finalize._registry) if each.atexit]
        for each in self._finalizers:
            each.atexit = False
        self._of_multiprocessing = dict(_util._finalizer_registry)
        _util._finalizer_registry.clear()
        self._children = set(_process._children)
        _process._children.clear()

    def take_back(self) -> None:
        """Be again as before."""
        for each in self._finalizers:
            each.atexit = True
        _util._finalizer_registry.update(self._of_multiprocessing)
        _process._children.update(self._children)


def leave_out_inherited() -> None:
    """Have a worker do at exit what its tasks ask for, and not what was imported before.

    To clear the list would cost up to 30 pages: this stands before what a worker has inherited, and ends it.
    """

    def end() -> None:
        _util._exit_function()
        _util._flush_std_streams()
        os._exit(exit_code)

    atexit.register(end)
    _finalize._registered_with_atexit = False  # else weakref would rely on what is not reached


def end_what_is_left(pid: int) -> None:
    """End this process, and what an import has started in its group: a Manager, a pool.

    Resource trackers take no SIGTERM: they remove what is left when they see that this process is gone.
    """
    if os.getpid() != pid:
        return  # A process that an import has forked ends without us.
    _util._flush_std_streams()
    try:
        for fd in map(int, os.listdir("/dev/fd")):  # noqa: PTH208
            if fd > 2:
                with contextlib.suppress(OSError):  # that of the listing itself
                    os.close(fd)
    except OSError:  # no /proc
        os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), MOST_FILES))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + REST_SECONDS
    try:
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.002)
    except ChildProcessError:
        pass  # All have ended.
    end_group(0)


def end_group(pid: int) -> None:
    """End a process, if it is there, and those of its group."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def has_ended(pid: int, *, wait: bool = False) -> bool:
    """Return whether a child has ended and is not reaped: its number is still that of its group.

    Parameters
    ----------
    pid : int
    wait : bool
        Return when it has, or when the caller's own code has reaped it.
    """
    if hasattr(os, "waitid"):
        try:
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)) is not None
        except ChildProcessError:
            return False
    while True:  # macOS before Python 3.13
        try:
            process = psutil.Process(pid)
            ended = process.status() == psutil.STATUS_ZOMBIE
            if ended or not wait or process.ppid() != os.getpid():
                return ended
        except psutil.NoSuchProcess:
            return False
        time.sleep(POLL_SECONDS)


def end_with_parent() -> None:
    """Have the kernel end this process when its parent, the template, ends."""
    parent = os.getppid()
    _have_signal_at_parents_end(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def continue_without_parent() -> None:
    """Have the kernel let this process go on when its parent ends, if it is stopped then: so it can end.

    The kernel does so to a process group that nobody is left to look after, but not while a stop is on its
    way. It follows the thread that has started this process: to be continued too early does no harm.
    """
    _have_signal_at_parents_end(signal.SIGCONT)


def _have_signal_at_parents_end(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
