"""What a new interpreter is told before it imports anything: its path, its name, its caller, its tracker."""

import contextlib
import sys
from multiprocessing import get_start_method, process, resource_tracker, util
from pathlib import Path
from typing import Any

from fedexec._system import forks

__all__ = ["preparation", "sys_path", "tracker_fd"]

_util: Any = util  # gives access to underscored names, which type checkers do not know


def tracker_fd() -> int:
    """Return the descriptor of the pipe to the resource tracker, after starting the tracker if necessary.

    Returns
    -------
    int
    """
    with forks.no_fork():  # A process forked meanwhile would inherit the tracker's lock in a locked state.
        fd = resource_tracker.getfd()
    assert fd is not None
    return fd


def preparation(name: str) -> dict[str, object]:
    """Return what multiprocessing tells a new process about its parent, without the parent's ``__main__``.

    There are two differences from multiprocessing's own function. This one does not fix the start method of
    this process, which could not be changed afterwards. And the working directory may be missing.

    Parameters
    ----------
    name : str
        Name of the new process.

    Returns
    -------
    dict of str to object
        Argument of :func:`multiprocessing.spawn.prepare`.
    """
    data = {
        "name": name,
        # As bytes: AuthenticationString can be pickled only while multiprocessing starts a process.
        "authkey": bytes(process.current_process().authkey),
        "log_to_stderr": _util._log_to_stderr,
        "sys_path": sys_path(),
        "sys_argv": sys.argv,
        "orig_dir": process.ORIGINAL_DIR,  # type: ignore[attr-defined]
    }
    if _util._logger is not None:
        data["log_level"] = _util._logger.getEffectiveLevel()
    if (start_method := get_start_method(allow_none=True)) is not None:
        data["start_method"] = start_method  # for processes that tasks start
    with contextlib.suppress(OSError):
        data["dir"] = str(Path.cwd())  # If the directory was removed, the worker stays in it.
    return data


def sys_path() -> list[str]:
    """Return ``sys.path`` for another process: strings only, and the start directory in place of ""."""
    here = process.ORIGINAL_DIR or ""  # type: ignore[attr-defined]
    return [str(entry or here) for entry in sys.path if isinstance(entry, str)]
