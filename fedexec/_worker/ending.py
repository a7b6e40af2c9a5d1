"""The end of a worker: when the caller's process has ended, or when the work of the worker is done."""

import _signal  # type: ignore[import-not-found]  # calls through `signal` would cost a worker 50 pages
import atexit
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import util
from typing import Any, NoReturn

if sys.platform == "linux":
    import fcntl

__all__ = ["end_with_caller", "leave", "leave_the_callers_group", "signals_hangup"]

LEAVE_SECONDS = 5.0  # the longest that a worker may take to end when its work is done
_SIGALRM = int(signal.SIGALRM) if hasattr(signal, "setitimer") else None
_SIG_DFL, _SIG_UNBLOCK = int(signal.SIG_DFL), int(getattr(signal, "SIG_UNBLOCK", 0))
_util: Any = util  # type checkers do not know its names that begin with an underscore


def leave_the_callers_group() -> None:
    """Make this process the leader of a process group.

    Then Ctrl+C in the terminal reaches the caller only, and one signal to the group ends this worker and all
    processes that it has started.
    """
    if hasattr(os, "setpgid"):
        try:
            os.setpgid(0, 0)
        except PermissionError:
            pass  # this process already leads a session
        if signal.SIGINT in signal.sigpending():  # from a Ctrl+C before; it was for the caller too
            signal.sigwait({signal.SIGINT})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_with_caller(tidy: Callable[[], object] | None = None) -> None:
    """End this process, and the processes that it has started, when the caller's process has ended.

    This works however the caller ends. ``PR_SET_PDEATHSIG`` would not: it follows the *thread* that has
    started this process.

    Parameters
    ----------
    tidy : callable, optional
        ``tidy()`` is called first, in a thread. Without it, the kernel ends this process if it can.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel
    if tidy is None and signals_hangup(sentinel, signal.SIGKILL):
        poll = select.poll()
        poll.register(sentinel)
        if poll.poll(0):
            os.killpg(0, signal.SIGKILL)  # the caller had ended before
        return

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        if tidy is not None:
            tidy()
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="fedexec-end-with-caller", daemon=True).start()


def signals_hangup(pipe: int, number: int) -> bool:
    """Have the kernel send this process's group a signal when the other end of a pipe is closed.

    A thread that watches the pipe would cost more, and could not act while another thread holds the GIL.

    Parameters
    ----------
    pipe : int
        Descriptor of a pipe.
    number : int
        Number of the signal.

    Returns
    -------
    bool
        False if the kernel cannot do this (only Linux can), or a sandbox refuses it.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, int(number))
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        return False
    return True


def leave() -> NoReturn:
    """End this worker, whose work is done, even if its tasks have left something running.

    The order is that of a script's end: first threads, and with them the pools of concurrent.futures, joblib
    and loky; then the child processes of multiprocessing and other exit functions. (A worker that
    multiprocessing ends waits for child processes first, and idle ones of joblib then keep it for minutes.)
    Anything that takes longer than LEAVE_SECONDS ends with the worker, as its child processes do.
    """
    code = 1
    try:
        if _SIGALRM is not None:
            # The kernel then ends a worker that does not end by itself, even if a thread holds the GIL.
            _signal.signal(_SIGALRM, _SIG_DFL)
            _signal.pthread_sigmask(_SIG_UNBLOCK, (_SIGALRM,))
            _signal.setitimer(_signal.ITIMER_REAL, LEAVE_SECONDS)
        threading._shutdown()  # type: ignore[attr-defined]  # the interpreter calls it at its end
        atexit._run_exitfuncs()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _util._flush_std_streams()
        os._exit(code)
