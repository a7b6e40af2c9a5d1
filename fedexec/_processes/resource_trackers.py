"""Resource trackers of multiprocessing and loky, started so that they outlive the caller's group."""

import os
import signal
from multiprocessing import spawn, util
from types import ModuleType
from typing import Any

from fedexec._system import forks

__all__ = ["start_tracker_apart"]

_util: Any = util  # its names that type checkers do not know


def start_tracker_apart(module: ModuleType) -> None:
    """Start a resource tracker that leads a process group of its own, unless it runs already.

    It removes the names of semaphores when the caller is gone. Left in the caller's group it is ended by what
    ends the whole group (``kill -9 -PGID``, a closed terminal), and the names stay for ever.

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
        # Blocked until it ignores them and says so to the kernel, both of which its main() does first.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            # Its number stays unknown to multiprocessing, which newer releases of CPython have wait at exit
            # for the end of a tracker that they know: it lives as long as any process that a task has left.
            os.posix_spawn(command[0], command, os.environ, setpgroup=0)
        except BaseException:
            os.close(writing)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(reading)
        tracker._fd = writing
