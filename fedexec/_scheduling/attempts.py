"""Runs a task once on the backend, and ends the task's worker when a limit is exceeded or the user asks."""

import functools

from fedexec._scheduling.admission import Admission
from fedexec._scheduling.deadline import TaskDeadline
from fedexec._system.available_resources import SIGKILL
from fedexec.errors import TaskTimeoutError, WorkerDiedError, WorkerMemoryError
from fedexec.interface import Backend, Capability, Outcome, Task

__all__ = ["Attempts"]


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

    def run(self, task: Task) -> Outcome:
        """Run a task once, within its time limit.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Outcome

        Raises
        ------
        WorkerDiedError
            The worker ended before it gave a result.
        TaskTimeoutError
            The worker was ended because the task took longer than its time limit.
        WorkerMemoryError
            The worker was ended because it held more memory than its limit.
        """
        deadline = None
        if task.timeout is not None and Capability.KILLS_ONE in self._backend.capabilities:
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
