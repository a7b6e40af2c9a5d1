"""Starts a SuperNode, and ends all that it has started: if told to, if it ends, or if its caller is gone.

It runs as a script: ``keeper.py PID PROGRAM ARGUMENT...``, where PID is the caller's. A SuperNode has
processes of its own, which notice its end only if somebody reaps it; so it is a child of this process.
"""

import contextlib
import os
import signal
import sys
import time

LOOK_SECONDS, LEAVE_SECONDS = 0.1, 8.0
_asked: list[float] = []


def main() -> None:
    """Keep one SuperNode."""
    caller, program = int(sys.argv[1]), sys.argv[2:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is the caller's, who tells us
    signal.signal(signal.SIGTERM, lambda *_: _asked.append(time.monotonic()))
    defaults = [signal.SIGINT, signal.SIGTERM, signal.SIGPIPE]
    child = os.posix_spawn(program[0], program, os.environ, setpgroup=0, setsigdef=defaults)
    code = keep(child, caller)
    send(child, signal.SIGKILL)
    os._exit(code if code >= 0 else 128 - code)


def keep(child: int, caller: int) -> int:
    """Wait for the end of a SuperNode; return its exit code, negative if a signal has ended it.

    Parameters
    ----------
    child : int
        Its process, and its process group.
    caller : int
        If this process is gone, the SuperNode is killed.

    Returns
    -------
    int
    """
    is_told = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if os.getppid() != caller or (_asked and time.monotonic() > _asked[0] + LEAVE_SECONDS):
            send(child, signal.SIGKILL)
        elif _asked and not is_told:
            is_told = True
            os.kill(child, signal.SIGTERM)
        time.sleep(LOOK_SECONDS)


def send(group: int, number: int) -> None:
    """Send a signal to a process group, if there is one.

    Parameters
    ----------
    group : int
    number : int
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


if __name__ == "__main__":
    main()
