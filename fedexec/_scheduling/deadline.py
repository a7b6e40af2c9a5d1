"""Enforces the time limit of a task."""

import signal
import threading
import time
from collections.abc import Callable

from fedexec._system.available_resources import SIGKILL
from fedexec.interface import Task

__all__ = ["TaskDeadline"]

GRACE_SECONDS = 2.0  # from SIGTERM, which lets the task clean up, to SIGKILL


class TaskDeadline:
    """Ends the worker of a task that takes too long: with SIGTERM, and after a grace period with SIGKILL.

    SIGTERM comes first so that the worker can write the stack of each thread to stderr, and the task can
    clean up.

    Parameters
    ----------
    task : Task
        Its time starts when the deadline is made.
    seconds : float
        Time limit in seconds; the task's `held_up` seconds do not count.
    kill : callable
        ``kill(signal_number)`` sends that signal to the task's worker.

    Attributes
    ----------
    passed : bool
        Whether the time limit was exceeded.
    """

    def __init__(self, task: Task, seconds: float, kill: Callable[[int], object]) -> None:
        self.seconds = seconds
        self.passed = False
        self._task = task
        self._begun = time.monotonic() - task.held_up
        self._kill = kill
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="fedexec-deadline", daemon=True).start()

    def cancel(self) -> None:
        """Stop the deadline, because the task has ended."""
        self._ended.set()

    def _watch(self) -> None:
        while (left := self._begun + self.seconds + self._task.held_up - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        self.passed = True
        self._kill(signal.SIGTERM)
        if not self._ended.wait(GRACE_SECONDS):
            self._kill(SIGKILL)
