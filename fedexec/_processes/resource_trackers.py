"""Start of the resource trackers of multiprocessing and loky outside the caller's process group."""

import os
import signal
from multiprocessing import spawn, util
from types import ModuleType
from typing import Any

from fedexec._system import forks

__all__ = ["start_tracker_apart"]

_util: Any = util  # gives access to underscored names, which type checkers do not know


def start_tracker_apart(module: ModuleType) -> None:
    """Start a resource tracker that leads a process group of its own, unless it runs already.

    The tracker removes the names of semaphores when the caller is gone. In the caller's group, the tracker
    would end with the group (``kill -9 -PGID``, a closed terminal), and the names would stay for ever.

    Parameters
    ----------
    module : module
        :mod:`multiprocessing.resource_tracker`, or loky's.
    """
    tracker: Any = module._resource_tracker
    with forks.no_fork(), tracker._lock:
        if tracker._fd is not None:
            return
        reading, writing = os.pipe()
        command = [os.fsdecode(spawn.get_executable()), *_util._args_from_interpreter_flags()]
        command += ["-c", f"from {module.__name__} import main; main({reading})"]
        os.set_inheritable(reading, True)
        # Block both signals until the tracker ignores them, which its main() arranges first.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            # multiprocessing must not know the tracker's pid: newer releases of CPython wait at exit for a
            # tracker with a known pid, and it lives as long as any process that a task has left.
            os.posix_spawn(command[0], command, os.environ, setpgroup=0)
        except BaseException:
            os.close(writing)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(reading)
        tracker._fd = writing
