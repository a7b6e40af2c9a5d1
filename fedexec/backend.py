"""What the author of a backend needs, all of it public: the built-in backends import nothing else.

A backend that runs tasks in this process needs :class:`Backend` alone. One that runs them in processes
inherits :class:`IsolatingBackend` and decides two things: which worker runs a task, and how the message gets
there and the reply back. The steps of one task:

1. The executor calls ``run(task)`` in one of its threads.
2. ``self.channel.deliver(task, call)`` packs the task, calls ``call(message)``, and unpacks the reply.
3. ``call`` takes the message, bytes, to a worker: a process of ``self.context`` (by pipe, queue or pool).
4. The worker has called ``setup(self.worker_setup)`` once, and calls ``run(message)``, which never raises.
5. ``call`` returns those bytes, or raises :class:`~fedexec.errors.WorkerDiedError`.

Register the class in the entry-point group ``fedexec.backends``, and inherit the suites of
:mod:`fedexec.testing`: they show that it keeps its promises.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedexec._channel.stderr import rehearse as rehearse_stderr
from fedexec._channel.task_channel import TaskChannel, rehearsal
from fedexec._processes.launcher import Launcher
from fedexec._processes.mp_context import WorkerContext, WorkerProcess, end_process, exit_code
from fedexec._processes.resource_trackers import start_tracker_apart
from fedexec._processes.stopped import await_answer, await_reader, start_watching
from fedexec._processes.worker_pipe import await_beginning, receive, serve
from fedexec._scheduling.limits import Limits
from fedexec._worker.ending import end_with_caller
from fedexec._worker.running import run
from fedexec._worker.setup import WorkerSetup, device_environment, preload, setup
from fedexec.errors import BackendUnavailableError, InitializerError, WorkerDiedError, is_out_of_memory
from fedexec.interface import Backend, Capability, Hooks, Outcome, Task, Usage
from fedexec.settings import Settings

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
    """What backends whose tasks run in processes have in common. A subclass adds ``run``.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
    service : Service, optional
        What every worker does, where all do the same; workers are then started with a connection only.
    shared_memory : bool, optional
        Whether large arrays go through shared memory. Default: as ``settings.shared_memory``.

    Attributes
    ----------
    launcher : Launcher
        Starts processes: forked from a template of this executor's own, or as fresh interpreters.
    context : WorkerContext
        A :mod:`multiprocessing` context whose processes the launcher starts; pools take it as ``mp_context``.
    worker_setup : WorkerSetup
        What a worker is to be told: it calls ``setup(worker_setup)`` before its first task.
    channel : TaskChannel
        Takes tasks to workers and brings their outcomes back.
    """

    def __init__(
        self, settings: Settings, hooks: Hooks, *, service: Any = None, shared_memory: bool | None = None
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
        self._workers: dict[int, WorkerProcess] = {}  # task id -> the process that runs it

    def start(self) -> None:
        """Import the preload, where workers are forked from a template."""
        self.launcher.start()

    @contextlib.contextmanager
    def running(self, task: Task, worker: WorkerProcess) -> Iterator[None]:
        """Have :meth:`kill` end this worker while it runs the task; it is ended here if that came before.

        Parameters
        ----------
        task : Task
            Learns the worker's pid.
        worker : WorkerProcess
            It has been started.
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

    def kill(self, task: Task, number: int = signal.SIGKILL) -> None:
        """End the worker of a task, and what it started; see :meth:`Backend.kill`."""
        with self._workers_lock:
            worker = self._workers.get(task.id)
        if worker is not None:
            end_process(worker, number)

    def renew_workers(self) -> None:
        """Replace the workers that wait: the next ones are born with more. Nothing, if none wait."""

    def rehearse(self, call: Callable[[], object], name: str) -> str | None:
        """Have workers be born with what a call leaves in memory; see :meth:`Backend.rehearse`."""
        return self.launcher.rehearse(call, name, self.renew_workers)

    def learning(self) -> Mapping[str, Any]:
        """Return what workers have learnt."""
        return self.channel.learning()

    def shutdown(self) -> None:
        """End the template and give back the shared memory. A subclass ends its workers first."""
        self.launcher.stop()
        self.channel.close()
