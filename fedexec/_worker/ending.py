"""How a worker ends: with its caller, whatever ended that, or by itself when its work is done."""

import _signal  # type: ignore[import-not-found]  # what a worker calls through `signal` costs it 50 pages
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

LEAVE_SECONDS = 5.0  # that a worker whose work is done may take to end
_SIGALRM = int(signal.SIGALRM) if hasattr(signal, "setitimer") else None
_SIG_DFL, _SIG_UNBLOCK = int(signal.SIG_DFL), int(getattr(signal, "SIG_UNBLOCK", 0))
_util: Any = util  # its underscored names, which type checkers do not know


def leave_the_callers_group() -> None:
    """Lead a process group of our own: Ctrl+C is the caller's business, and one signal ends us and ours."""
    if hasattr(os, "setpgid"):
        try:
            os.setpgid(0, 0)
        except PermissionError:
            pass  # already the leader of a session
        if signal.SIGINT in signal.sigpending():  # a Ctrl+C from before: not ours either
            signal.sigwait({signal.SIGINT})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_with_caller(tidy: Callable[[], object] | None = None) -> None:
    """End this process, and what it started, when the process that asked for it is gone, however it ended.

    Not by ``PR_SET_PDEATHSIG``, which follows the *thread* that started us.

    Parameters
    ----------
    tidy : callable, optional
        To be called first, by a thread. Without it the kernel ends this process where it can.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel
    if tidy is None and signals_hangup(sentinel, signal.SIGKILL):
        poll = select.poll()
        poll.register(sentinel)
        if poll.poll(0):
            os.killpg(0, signal.SIGKILL)  # it was gone already
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
    """Have the kernel send this process's group a signal when the other end of a pipe is gone.

    A watching thread costs more, and does nothing while another one keeps Python's global lock. But only
    Linux can do this, and some sandboxes refuse it: False.
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
    """End this worker, whose work is done, whatever its tasks have left running.

    In the order of a script's end: threads first, and with them the pools of concurrent.futures, joblib and
    loky; then multiprocessing's children and other exit functions. A worker that multiprocessing ends waits
    for children first, and joblib's idle ones then keep it for minutes. What takes longer than LEAVE_SECONDS
    ends with the worker, as its children do.
    """
    code = 1
    try:
        if _SIGALRM is not None:
            # The kernel ends a worker that is stuck, even where a thread holds Python's global lock.
            _signal.signal(_SIGALRM, _SIG_DFL)
            _signal.pthread_sigmask(_SIG_UNBLOCK, (_SIGALRM,))
            _signal.setitimer(_signal.ITIMER_REAL, LEAVE_SECONDS)
        threading._shutdown()  # type: ignore[attr-defined]  # what an interpreter that ends calls
        atexit._run_exitfuncs()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _util._flush_std_streams()
        os._exit(code)
