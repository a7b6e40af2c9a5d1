"""Everything that the author of a backend needs. It is public, and the built-in backends use nothing else.

A backend that runs tasks in this process only needs :class:`Backend`. A backend that runs tasks in other
processes inherits from :class:`IsolatingBackend` and decides two things: which worker runs a task, and how
the message gets to the worker and the reply back. These are the steps of one task:

1. The executor calls ``run(task)`` in one of its threads.
2. ``self.channel.deliver(task, call)`` packs the task, calls ``call(message)``, and unpacks the reply.
3. ``call`` sends the message, which is bytes, to a worker by a pipe, a queue or a pool. Workers are processes
   of ``self.context``.
4. The worker has called ``setup(self.worker_setup)`` once. It calls ``run(message)``, which never raises and
   returns the reply, which is bytes too.
5. ``call`` returns the reply, or raises :class:`~fedexec.errors.WorkerDiedError`.

Register the class in the entry-point group ``fedexec.backends``. Inherit from the test suites of
:mod:`fedexec.testing`, which show that the backend has the capabilities that it declares.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedexec._channel.stderr import rehearse as rehearse_stderr
from fedexec._channel.task_channel import TaskChannel, rehearsal
from fedexec._scheduling.reuse_limits import Limits
from fedexec._system.available_resources import SIGKILL
from fedexec._worker.ending import end_with_caller
from fedexec._worker.running import run
from fedexec._worker.setup import WorkerSetup, device_environment, preload, setup
from fedexec.errors import BackendUnavailableError, InitializerError, WorkerDiedError, is_out_of_memory
from fedexec.interface import Backend, Capability, Hooks, Outcome, Task, Usage
from fedexec.settings import Settings

if sys.platform != "win32":  # Windows has the names for a backend that runs tasks in the caller's process.
    from fedexec._processes.forker import Service
    from fedexec._processes.launcher import Launcher
    from fedexec._processes.mp_context import WorkerContext, WorkerProcess, end_process, exit_code
    from fedexec._processes.resource_trackers import start_tracker_apart
    from fedexec._processes.stopped_processes import await_answer, await_reader, start_watching
    from fedexec._processes.worker_pipe import await_beginning, receive, serve

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "Capability",
    "Hooks",
    "InitializerError",
    "IsolatingBackend",
    "Launcher",
    "Limits",
    "Outcome",
    "Service",
    "Settings",
    "Task",
    "TaskChannel",
    "Usage",
    "WorkerContext",
    "WorkerDiedError",
    "WorkerProcess",
    "WorkerSetup",
    "await_answer",
    "await_beginning",
    "await_reader",
    "device_environment",
    "end_process",
    "end_with_caller",
    "exit_code",
    "is_out_of_memory",
    "preload",
    "receive",
    "rehearsal",
    "rehearse_stderr",
    "run",
    "serve",
    "setup",
    "start_tracker_apart",
    "start_watching",
]


class IsolatingBackend(Backend):
    """Base class of backends that run tasks in other processes. A subclass adds :meth:`run`.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
    service : Service, optional
        What every worker does, if all workers do the same; each worker then gets only a connection.
    shared_memory : bool, optional
        Whether large arrays go through shared memory. Default: ``settings.shared_memory``.

    Attributes
    ----------
    launcher : Launcher
        Starts processes: they are forked from the executor's own template, or are fresh interpreters.
    context : WorkerContext
        A :mod:`multiprocessing` context whose processes the launcher starts. Pools take it as ``mp_context``.
    worker_setup : WorkerSetup
        What a worker needs for its set-up; it calls ``setup(worker_setup)`` before its first task.
    channel : TaskChannel
        Takes tasks to workers and brings their outcomes back.
    """

    def __init__(
        self,
        settings: Settings,
        hooks: Hooks,
        *,
        service: Service | None = None,
        shared_memory: bool | None = None,
    ) -> None:
        super().__init__(settings, hooks)
        self.launcher = Launcher(settings, hooks, type(self).__module__, service)
        self.context = WorkerContext(self.launcher)
        self.worker_setup = WorkerSetup.of(settings, hooks)
        self.channel = TaskChannel(
            shared_memory=settings.shared_memory if shared_memory is None else shared_memory,
            learner=self.launcher.learner(self.renew_workers),
        )
        self._workers_lock = threading.Lock()
        self._workers: dict[int, WorkerProcess] = {}  # by task id: the process that runs the task

    def start(self) -> None:
        """Start the template and import the preload there, if workers are forked."""
        self.launcher.start()

    @contextlib.contextmanager
    def running(self, task: Task, worker: WorkerProcess) -> Iterator[None]:
        """Make a worker the target of :meth:`kill` while it runs a task.

        If `kill` has been called already, the worker is ended at once.

        Parameters
        ----------
        task : Task
            Its attribute `pid` is set.
        worker : WorkerProcess
            Must have been started.
        """
        task.pid = worker.pid
        with self._workers_lock:
            self._workers[task.id] = worker
        try:
            if task.doomed:
                end_process(worker)
            yield
        finally:
            with self._workers_lock:
                del self._workers[task.id]

    def kill(self, task: Task, number: int = SIGKILL) -> None:
        """End the worker of a task, and the processes that it has started; see :meth:`Backend.kill`."""
        with self._workers_lock:
            worker = self._workers.get(task.id)
        if worker is not None:
            end_process(worker, number)

    def renew_workers(self) -> None:
        """Replace idle workers, because new workers inherit more. By default there are none to replace."""

    def rehearse(self, call: Callable[[], object], name: str) -> str | None:
        """Make a call whose effects in memory later workers inherit; see :meth:`Backend.rehearse`."""
        return self.launcher.rehearse(call, name, self.renew_workers)

    def learning(self) -> Mapping[str, Any]:
        """Return what the template has learnt; see :meth:`Backend.learning`."""
        return self.channel.learning()

    def shutdown(self) -> None:
        """End the template and give back the shared memory. A subclass must end its workers before."""
        self.launcher.stop()
        self.channel.close()
