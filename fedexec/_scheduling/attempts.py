"""Runs a task, again if its worker dies, and ends its worker when a limit is exceeded or the user asks."""

import functools
import logging
from collections.abc import Callable

from fedexec._scheduling.admission import Admission
from fedexec._scheduling.deadline import TaskDeadline
from fedexec._system.available_resources import SIGKILL
from fedexec.errors import TaskTimeoutError, WorkerDiedError, WorkerMemoryError
from fedexec.interface import Backend, Capability, Outcome, Task

__all__ = ["Attempts"]

log = logging.getLogger("fedexec")


class Attempts:
    """The attempts to run tasks of one executor. Thread-safe.

    Parameters
    ----------
    backend : Backend
    admission : Admission
        Measures the device while a task runs.
    """

    def __init__(self, backend: Backend, admission: Admission) -> None:
        self._backend = backend
        self._admission = admission
        self._memory_errors: dict[int, WorkerMemoryError] = {}  # by task id: why its worker is being ended

    def run(self, task: Task, count: Callable[[str], object], is_killing: Callable[[], bool]) -> Outcome:
        """Run a task, and again if its worker dies, as often as its retries allow. This never raises.

        Parameters
        ----------
        task : Task
        count : callable
            ``count(event)`` is called with what happens: "worker_deaths", "retries", "timeouts" or
            "memory_kills".
        is_killing : callable
            Returns whether all workers are to end, so that nothing runs again.

        Returns
        -------
        Outcome
        """
        left_retries = task.retries
        while True:
            try:
                return self._run_once(task)
            except WorkerDiedError as exc:
                count("worker_deaths")
                if not left_retries or not task.repeatable or is_killing() or task.doomed:
                    return Outcome(exception=exc.with_traceback(None))
                left_retries -= 1
                # Log only the text: a stored record would keep the traceback, and so the arguments, alive.
                log.warning("%s The task is run again.", str(exc))
                count("retries")
            except TaskTimeoutError as exc:
                count("timeouts")
                return Outcome(exception=exc.with_traceback(None))
            except WorkerMemoryError as exc:
                count("memory_kills")
                return Outcome(exception=exc.with_traceback(None))
            except BaseException as exc:
                return Outcome(exception=exc)

    def _run_once(self, task: Task) -> Outcome:
        deadline = None
        limits = Capability.KILLS_ONE | Capability.REMOTE  # a node keeps the time limit, which begins there
        if task.timeout is not None and self._backend.capabilities & limits is Capability.KILLS_ONE:
            deadline = TaskDeadline(task, task.timeout, functools.partial(self.kill, task))
        try:
            with self._admission.measuring(task):
                return self._backend.run(task)
        except WorkerDiedError as exc:
            if task.id in self._memory_errors:
                raise self._memory_errors[task.id] from None
            if deadline is not None and deadline.passed:
                timeout_error = TaskTimeoutError(task.name, deadline.seconds, exc.pid)
                timeout_error.quote(exc.stderr)
                try:
                    raise timeout_error from None
                finally:
                    del timeout_error  # avoid a reference cycle
            exc.is_deliberate = task.doomed
            raise
        finally:
            self._memory_errors.pop(task.id, None)
            if deadline is not None:
                deadline.cancel()

    def kill(self, task: Task, number: int = SIGKILL) -> None:
        """End the worker that runs a task.

        Parameters
        ----------
        task : Task
        number : int
            Number of the signal that the worker gets.
        """
        task.doomed = True
        self._backend.kill(task, number)

    def end_for_memory(self, task: Task, error: WorkerMemoryError) -> None:
        """End the worker that runs a task, because it holds too much memory.

        Parameters
        ----------
        task : Task
        error : WorkerMemoryError
            Becomes the exception of the task.
        """
        self._memory_errors[task.id] = error
        self.kill(task)
