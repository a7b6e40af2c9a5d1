"""How a template and its workers exit: exit functions that imports have registered run only once.

They run in the process that has imported. A worker or a successor runs only the exit functions that were
registered after its fork.
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

from fedexec._system.available_resources import SIGKILL

__all__ = [
    "ToDoAtExit",
    "continue_without_parent",
    "end_group",
    "end_what_is_left",
    "end_with_parent",
    "has_ended",
    "leave_out_inherited",
]

_util: Any = util  # gives access to underscored names, which type checkers do not know
_process: Any = process
_finalize: Any = weakref.finalize
REST_SECONDS = 0.5  # time that a process which an import has started has to end after SIGTERM
MOST_FILES = 1 << 20  # the highest common default of the limit on open descriptors
POLL_SECONDS = 0.01
_PR_SET_PDEATHSIG = 1

exit_code = 0  # exit code of a worker that only has its exit functions left to run


class ToDoAtExit:
    """Exit functions that imports have registered: this process runs them when it exits, and workers do not.

    The list of :mod:`atexit` itself cannot be read or replaced: see :func:`leave_out_inherited`.
    """

    def __init__(self) -> None:
        # weakref has no public list of its finalizers. In workers, a finalizer still runs when its object is
        # collected, but not at exit.
        self._finalizers = [each for each in list(_finalize._registry) if each.atexit]
        for each in self._finalizers:
            each.atexit = False
        self._of_multiprocessing = dict(_util._finalizer_registry)
        _util._finalizer_registry.clear()
        self._children = set(_process._children)
        _process._children.clear()

    def take_back(self) -> None:
        """Register the exit functions again."""
        for each in self._finalizers:
            each.atexit = True
        _util._finalizer_registry.update(self._of_multiprocessing)
        _process._children.update(self._children)


def leave_out_inherited() -> None:
    """Let a worker run at exit only what its tasks have registered, not what was registered before the fork.

    Clearing the inherited list would copy up to 30 memory pages. Instead, a function is registered that runs
    before the inherited ones and ends the process.
    """

    def end() -> None:
        _util._exit_function()
        _util._flush_std_streams()
        os._exit(exit_code)

    atexit.register(end)
    # If this stayed true, weakref would rely on an exit function that is never reached.
    _finalize._registered_with_atexit = False


def end_what_is_left(pid: int) -> None:
    """End this process and what an import has started in its process group (a Manager, a pool).

    Resource trackers ignore SIGTERM: they remove what is left once they see that this process is gone.

    Parameters
    ----------
    pid : int
        The process that has registered this function; in any other process, the function does nothing.
    """
    if os.getpid() != pid:
        return  # A process that an import has forked must end by itself.
    _util._flush_std_streams()
    try:
        for fd in map(int, os.listdir("/dev/fd")):  # noqa: PTH208
            if fd > 2:
                with contextlib.suppress(OSError):  # the descriptor of the listing itself
                    os.close(fd)
    except OSError:  # /proc is missing.
        os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), MOST_FILES))
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    deadline = time.monotonic() + REST_SECONDS
    try:
        while time.monotonic() < deadline:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.002)
    except ChildProcessError:
        pass  # All children have ended.
    end_group(0)


def end_group(pid: int, number: int = SIGKILL) -> bool:
    """Send a signal to a process group if it exists.

    Parameters
    ----------
    pid : int
        The group's leader.
    number : int
        The signal; SIGKILL by default.

    Returns
    -------
    bool
        Whether the group exists.
    """
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        if sys.platform == "linux":
            raise
        # macOS says so of a group whose processes have all ended, as long as they are not reaped.
    return True


def has_ended(pid: int, *, wait: bool = False) -> bool:
    """Return whether a child has ended and is not reaped yet, so that its pid still names its group.

    Parameters
    ----------
    pid : int
    wait : bool
        Whether to wait until the child has ended or other code of the caller has reaped it.

    Returns
    -------
    bool
        False if it still runs, or has been reaped.
    """
    if hasattr(os, "waitid"):
        try:
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)) is not None
        except ChildProcessError:
            return False
    import psutil  # on macOS before Python 3.13

    while True:
        try:
            process = psutil.Process(pid)
            ended = process.status() == psutil.STATUS_ZOMBIE
            if ended or not wait or process.ppid() != os.getpid():
                return ended
        except psutil.NoSuchProcess:
            return False
        time.sleep(POLL_SECONDS)


def end_with_parent() -> None:
    """Let the kernel end this process when its parent, the template, ends."""
    parent = os.getppid()
    _have_signal_at_parents_end(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def continue_without_parent() -> None:
    """Let the kernel continue this process when its parent ends, so that a stopped process can end, too.

    The kernel does the same for an orphaned process group, but not while a stop is pending. The signal
    follows the thread that has started this process; an early signal does no harm.
    """
    _have_signal_at_parents_end(signal.SIGCONT)


def _have_signal_at_parents_end(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(number))
