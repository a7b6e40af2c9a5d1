"""``standby``: workers wait before there is work, so that a fresh process per task is as fast as a warm pool.

A template imports the preload, runs the warm-up once, and forks workers ahead of demand. A waiting worker
gets a task, runs it, answers and ends, and all its resources are freed with it; meanwhile the template forks
the next worker. If ``max_tasks_per_child`` is above 1, a worker serves that many tasks, or fewer if a task
leaves it above ``memory_limit``.

With ``start_method="spawn"``, or if the template is unfit to be forked, the waiting workers are fresh
interpreters that have imported the preload. They take longer to start, and make the same promises.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection

from fedexec.backend import (
    Capability,
    Hooks,
    IsolatingBackend,
    Limits,
    Outcome,
    Settings,
    Task,
    Usage,
    WorkerContext,
    WorkerDiedError,
    WorkerProcess,
    WorkerSetup,
    await_beginning,
    await_reader,
    end_process,
    exit_code,
    receive,
    rehearsal,
    rehearse_stderr,
    run,
    serve,
    setup,
)

__all__ = ["StandbyBackend"]

# The interpreter needs this many runs to specialize its code and fill its caches (8 in CPython 3.11).
REHEARSALS = 20
LEAVE_SECONDS = 5.0  # time that a worker that has answered has to end


class StandbyBackend(IsolatingBackend):
    """Gives each task to a waiting worker.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
    """

    capabilities = (
        Capability.ISOLATED
        | Capability.FRESH_PROCESS
        | Capability.SURVIVES_DEATH
        | Capability.KILLS_ONE
        | Capability.STANDS_BY
        | Capability.SHARES_MEMORY
    )
    descriptors_per_worker = 10

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        self._service = _Service(
            WorkerSetup.of(settings, hooks),
            settings.max_tasks_per_child,
            rehearsal(shared_memory=settings.shared_memory),
        )
        super().__init__(settings, hooks, service=self._service)
        if settings.max_tasks_per_child > 1:
            self.capabilities = self.capabilities & ~Capability.FRESH_PROCESS | Capability.RECYCLES
        self._limits = Limits(settings)
        # guards everything below; used itself, because Ctrl+C can break `with self._changed`
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._idle_workers: deque[_Worker | Exception] = deque()  # An exception tells why there is no worker.
        self._waiting_tasks = 0  # number of tasks that wait for a worker
        self._leaving: list[_Worker] = []
        self._running: dict[int, _Worker] = {}  # task id -> its worker
        self._generation = 0  # number of times that workers have been renewed
        self._closing = False
        self._killing = False
        self._keeper = threading.Thread(target=self._maintain_workers, name="fedexec-standby", daemon=True)

    def start(self) -> None:
        """Start the template, then the first workers."""
        super().start()
        self._keeper.start()

    def run(self, task: Task) -> Outcome:
        """Run one task in a waiting worker.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Outcome
        """
        lent: list[_Worker] = []
        usage = None
        try:
            outcome = self.channel.deliver(task, functools.partial(self._call, task, lent))
            usage = outcome.usage
        finally:
            for worker in lent:
                self._give_back(task, worker, usage)
        return outcome

    def kill(self, task: Task, number: int = signal.SIGKILL) -> None:
        """Send a signal to the worker of a task; see :meth:`Backend.kill`."""
        with self._lock:
            worker = self._running.get(task.id)
        if worker is not None:
            # Before a task begins, for example during the initializer, it has nothing to clean up; and the
            # worker would write its stacks to the caller's stderr.
            end_process(worker.process, number if worker.has_begun else signal.SIGKILL)

    def kill_waiting(self) -> None:
        """End the waiting workers at once, also those that are still in their initializer."""
        with self._lock:
            self._killing = True
            workers = [worker for worker in self._idle_workers if isinstance(worker, _Worker)]
            workers += self._leaving
        for worker in workers:
            worker.kill()

    def restarts(self) -> Mapping[str, int]:
        """Return how many workers were replaced, by cause."""
        return self._limits.replaced()

    def shutdown(self) -> None:
        """End the waiting workers, then the template."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()
        if self._keeper.ident is not None:
            self._keeper.join()
        workers = [worker for worker in self._idle_workers if isinstance(worker, _Worker)]
        for worker in workers:
            worker.leave()
        for worker in workers + self._leaving:
            worker.end(at_once=self._killing)
        self._idle_workers.clear()
        self._leaving.clear()
        super().shutdown()

    # ------------------------------------------------------------ from a task to a worker and back

    def _call(self, task: Task, lent: "list[_Worker]", message: bytes) -> bytes:
        """Run a packed task in a worker; the worker is added to `lent`, so that the caller gives it back."""
        while lent:  # The first delivery's worker could not open the caller's shared memory.
            self._give_back(task, lent.pop(), None)
        # It is not the task's fault if workers end while they wait, unless all of them and three more do so.
        for left in range(self.settings.standby + 3, 0, -1):
            worker = self._take(task)
            lent.append(worker)
            try:
                if task.doomed:
                    end_process(worker.process)
                return worker.call(message, task)
            except _NotBegunError as exc:
                if left == 1 or task.doomed:
                    raise WorkerDiedError(*exc.args) from None
                self._give_back(task, lent.pop(), None)
        raise AssertionError("unreachable")

    def _take(self, task: Task) -> "_Worker":
        with self._lock:
            self._waiting_tasks += 1
            if not self._idle_workers:
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle_workers)
            self._waiting_tasks -= 1
            worker = next((each for each in self._idle_workers if _fits(each, task)), self._idle_workers[0])
            self._idle_workers.remove(worker)
            self._changed.notify_all()
            if isinstance(worker, Exception):
                raise worker
            self._running[task.id] = worker
            task.pid = worker.process.pid
            if _fits(worker, task):
                worker.device = task.device
                return worker
        # All waiting workers use other devices: replace one of them by a new worker.
        self._give_back(task, worker, None)
        return self._take(task)

    def _give_back(self, task: Task, worker: "_Worker", usage: Usage | None) -> None:
        """Release a worker, or let it wait again if it may serve another task."""
        serves_again = (
            usage is not None and not task.doomed and worker.served < self.settings.max_tasks_per_child
        )
        serves_again = serves_again and not self._limits.exceeded(usage)
        if not serves_again:
            worker.leave()
            if usage is not None and usage.may_hold_device:
                worker.process.join(LEAVE_SECONDS)  # The worker holds the memory until it has ended.
        with self._lock:
            del self._running[task.id]
            if serves_again:
                self._idle_workers.appendleft(worker)
            else:
                self._leaving.append(worker)
            self._changed.notify_all()

    # ------------------------------------------------------------ the thread that maintains waiting workers

    def _maintain_workers(self) -> None:
        while True:
            with self._lock:
                while not self._closing and not self._is_short():
                    if not self._changed.wait(timeout=1.0 if self._leaving else None):
                        break  # Check the leaving workers.
                if self._closing:
                    return
                short = self._is_short()
                leaving, self._leaving = self._leaving, []
            if short:
                self._add_worker()
            remaining = [worker for worker in leaving if not worker.is_gone()]
            with self._lock:
                self._leaving += remaining

    def renew_workers(self) -> None:
        """Replace the waiting workers, because new workers have more modules."""
        with self._lock:
            self._generation += 1
            stale = [worker for worker in self._idle_workers if isinstance(worker, _Worker)]
            self._idle_workers.clear()
            for worker in stale:
                worker.leave()
            self._leaving += stale
            self._changed.notify_all()

    def _is_short(self) -> bool:
        return len(self._idle_workers) < self.settings.standby + self._waiting_tasks

    def _add_worker(self) -> None:
        worker: _Worker | Exception
        generation = self._generation
        try:
            worker = _Worker(self.context, self._service)
        except Exception as exc:  # no descriptors, no memory, or a preload that fails in a new template
            worker = exc
        with self._lock:
            if isinstance(worker, Exception):
                # until a task can be told
                self._changed.wait_for(lambda: self._closing or self._waiting_tasks)
            elif generation != self._generation and not self._closing:
                worker.leave()
                self._leaving.append(worker)
                return
            self._idle_workers.append(worker)
            self._changed.notify_all()


class _NotBegunError(WorkerDiedError):
    """A worker ended before it began its task."""


class _Worker:
    """A process that waits for tasks, and the caller's end of the connection to it."""

    def __init__(self, context: WorkerContext, service: "_Service") -> None:
        self.connection, theirs = context.Pipe()
        self.process: WorkerProcess = context.Process(target=service.serve, args=(theirs,))
        self.served = 0
        self.has_begun = False  # whether it has begun a task
        self.device: str | None = None  # device that the worker uses since its first task
        self._left_at = 0.0
        with theirs:
            self.process.start()

    def call(self, message: bytes, task: Task) -> bytes:
        """Run a packed task in this worker.

        Parameters
        ----------
        message : bytes
            The packed task.
        task : Task

        Returns
        -------
        bytes
            The packed reply.

        Raises
        ------
        WorkerDiedError
            The worker has ended instead of answering. _NotBegunError: it had not begun, so another worker may
            run the task.
        """
        self.has_begun = False
        try:
            with await_reader(self.process.pid, len(message)):
                self.connection.send_bytes(message)
            await_beginning(self.connection, self.process)
            self.has_begun = True
            reply = receive(self.connection, self.process)
        except (OSError, EOFError):
            # The worker may only have closed its end of the connection, but it can no longer answer.
            end_process(self.process)
            self.process.join()
        else:
            self.served += 1
            return reply
        error = WorkerDiedError if self.has_begun else _NotBegunError
        raise error(self.process.pid, exit_code(self.process), task.name)

    def leave(self) -> None:
        """Close the connection, so that the worker ends after its answer, or without a further task."""
        self.connection.close()
        self._left_at = time.monotonic()

    def kill(self) -> None:
        """End the worker at once."""
        with contextlib.suppress(ValueError):  # It has ended, and its process object is closed.
            end_process(self.process)

    def is_gone(self) -> bool:
        """Return whether the worker has ended; kill it if it takes longer than LEAVE_SECONDS."""
        if self.process.is_alive():
            if time.monotonic() > self._left_at + LEAVE_SECONDS:
                end_process(self.process)
            return False
        self.process.join()
        self.process.close()
        return True

    def end(self, *, at_once: bool) -> None:
        """Kill the worker, at once or if it takes longer than LEAVE_SECONDS to leave; wait for its end."""
        if not at_once:
            self.process.join(max(0.0, self._left_at + LEAVE_SECONDS - time.monotonic()))
        end_process(self.process)
        self.process.join()
        self.process.close()


def _fits(worker: "_Worker | Exception", task: Task) -> bool:
    return isinstance(worker, Exception) or worker.device in (None, task.device)


@dataclass(frozen=True, slots=True)
class _Service:
    """A worker's work: it sets itself up, then runs the tasks that it receives.

    Attributes
    ----------
    worker_setup : WorkerSetup
    tasks : int
        Number of tasks that a worker runs.
    rehearsal : bytes
        A task that does nothing; run in advance, it initializes what every task needs.
    """

    worker_setup: WorkerSetup
    tasks: int
    rehearsal: bytes

    def prepare(self) -> None:
        """Run the empty task in the template, so that workers inherit warm caches."""
        os.environ.update(self.worker_setup.environ)
        rehearse_stderr()
        for _ in range(REHEARSALS):
            run(self.rehearsal)

    def serve(self, connection: Connection) -> None:
        """Run tasks, in the worker.

        Parameters
        ----------
        connection : Connection
            The worker's end.
        """
        setup(self.worker_setup)
        run(self.rehearsal)  # copies the template's memory pages that each task writes to
        for _ in range(self.tasks):
            try:
                message = connection.recv_bytes()
            except EOFError:
                return
            serve(connection, message)
            if hasattr(os, "sched_yield"):
                # Linux may wake the caller on this core; yield the core, so that the caller need not wait for
                # this worker's end.
                os.sched_yield()
