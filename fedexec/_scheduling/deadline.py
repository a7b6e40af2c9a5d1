"""Where a task's time limit is enforced."""

import signal
import threading
import time
from collections.abc import Callable

from fedexec._system.machine import SIGKILL
from fedexec.interface import Task

__all__ = ["TaskDeadline"]

GRACE_SECONDS = 2.0  # between SIGTERM and SIGKILL


class TaskDeadline:
    """Ends a task that is late: first so that it can say where it is and clean up.

    Parameters
    ----------
    task : Task
        Its time begins now.
    seconds : float
        That it may take, beside what it is held up.
    kill : callable
        Takes a signal.
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
        """Take note that the task has ended."""
        self._ended.set()

    def _watch(self) -> None:
        while (left := self._begun + self.seconds + self._task.held_up - time.monotonic()) > 0:
            if self._ended.wait(left):
                return
        self.passed = True
        self._kill(signal.SIGTERM)
        if not self._ended.wait(GRACE_SECONDS):
            self._kill(SIGKILL)
