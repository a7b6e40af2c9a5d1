"""The record of tasks, shared by both ways to run a federation. Imports nothing of Flower."""

import threading
from concurrent.futures import Future
from typing import TypeVar

from fedexec._system.error_text import one_line
from fedexec.flower.history import TaskRecord

__all__ = ["TaskRecorder"]

T = TypeVar("T")


class TaskRecorder:
    """Records what each task was for, how it ended and what it cost; it can be used from many threads.

    Attributes
    ----------
    tasks : list of TaskRecord
        In the order in which they ended.
    """

    def __init__(self) -> None:
        self.tasks: list[TaskRecord] = []
        self._lock = threading.RLock()  # guards all attributes, also those of subclasses

    def ended(
        self,
        kind: str,
        client: int | None,
        server_round: int | None,
        error: str | None,
        future: object = None,
        *,
        start: int = 1,
    ) -> TaskRecord:
        """Note how a task has ended.

        Parameters
        ----------
        kind, client, server_round, error, start
            As in :class:`TaskRecord`.
        future : object
            The task's future, which tells what the task has cost if it is fedexec's; None if the task was not
            run, or has been given up.

        Returns
        -------
        TaskRecord
        """
        usage, started, ended = (getattr(future, name, None) for name in ("usage", "started", "ended"))
        record = TaskRecord(kind, client, server_round, error, usage, started, ended, start)
        with self._lock:
            self.tasks.append(record)
        return record

    def result_of(
        self, future: Future[T], *, kind: str, client: int | None = None, server_round: int | None = None
    ) -> T:
        """Wait for a task, and note how it has ended.

        ``recorder.result_of(executor.submit(fit, weights), kind="fit", client=7, server_round=1)``

        Parameters
        ----------
        future : Future
            Of any executor; only fedexec's tells what the task has cost.
        kind, client, server_round
            As in :class:`TaskRecord`.

        Returns
        -------
        object
            The task's result; its exception is raised here.
        """
        error = future.exception()
        self.ended(kind, client, server_round, None if error is None else one_line(error), future)
        return future.result()
