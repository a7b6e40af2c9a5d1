"""``standby``: workers that wait before there is work. A fresh process a task, at a warm pool's speed.

A template imports the preload, runs the warm-up once, and forks workers ahead of need. A task goes to one
that waits; it runs that one task, answers and ends, and everything it held ends with it; the next is forked
meanwhile. With ``max_tasks_per_child`` above 1 a worker serves that many, or fewer if one leaves it above
``memory_limit``.

With ``start_method="spawn"``, or where fork is not safe, the workers that wait are fresh interpreters that
have imported the preload: slower to come by, the same promise.
"""

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

# Until the interpreter has adapted its code and filled its caches: 8 would do in CPython 3.11.
REHEARSALS = 20
LEAVE_SECONDS = 5.0  # what a worker that has answered may take to end


class StandbyBackend(IsolatingBackend):
    """Hands a task to a worker that waits."""

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
        self._lock = threading.RLock()  # guards everything below; taken as it is, for Ctrl+C's sake
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[_Worker | Exception] = deque()  # an exception: why there is no worker
        self._wanted = 0  # tasks that wait for a worker
        self._leaving: list[_Worker] = []
        self._running: dict[int, _Worker] = {}  # task id -> its worker
        self._generation = 0  # how often workers have learnt something
        self._closing = False
        self._keeper = threading.Thread(target=self._keep, name="fedexec-standby", daemon=True)

    def start(self) -> None:
        """Start the template, then the first workers."""
        super().start()
        self._keeper.start()

    def run(self, task: Task) -> Outcome:
        """Run one task in a worker that waits."""
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
        """End the worker of `task`."""
        with self._lock:
            worker = self._running.get(task.id)
        if worker is not None:
            end_process(worker.process, number)

    def restarts(self) -> Mapping[str, int]:
        """Return how many workers were replaced, by cause."""
        return self._limits.replaced()

    def shutdown(self) -> None:
        """End the workers that wait, then the template."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()
        if self._keeper.ident is not None:
            self._keeper.join()
        workers = [worker for worker in self._waiting if isinstance(worker, _Worker)]
        for worker in workers:
            worker.leave()
        for worker in workers + self._leaving:
            worker.end()
        self._waiting.clear()
        self._leaving.clear()
        super().shutdown()

    # ------------------------------------------------------------ a task's way

    def _call(self, task: Task, lent: "list[_Worker]", message: bytes) -> bytes:
        """Have a worker run a packed task; the worker is added to `lent`, to be given back."""
        while lent:  # the worker of a first delivery, which could not open the caller's shared memory
            self._give_back(task, lent.pop(), None)
        # Workers that ended while they waited are no fault of the task; all of them, and three more, are.
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
            self._wanted += 1
            if not self._waiting:
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting)
            self._wanted -= 1
            worker = next((each for each in self._waiting if _fits(each, task)), self._waiting[0])
            self._waiting.remove(worker)
            self._changed.notify_all()
            if isinstance(worker, Exception):
                raise worker
            self._running[task.id] = worker
            task.pid = worker.process.pid
            if _fits(worker, task):
                worker.device = task.device
                return worker
        # All that wait have settled on other devices: one of them makes room for a new one.
        self._give_back(task, worker, None)
        return self._take(task)

    def _give_back(self, task: Task, worker: "_Worker", usage: Usage | None) -> None:
        """Let a worker go, or wait again if it may serve another task."""
        again = usage is not None and not task.doomed and worker.served < self.settings.max_tasks_per_child
        again = again and not self._limits.exceeded(usage)
        if not again:
            worker.leave()
            if usage is not None and usage.may_hold_device:
                worker.process.join(LEAVE_SECONDS)  # until then it holds it
        with self._lock:
            del self._running[task.id]
            if again:
                self._waiting.appendleft(worker)
            else:
                self._leaving.append(worker)
            self._changed.notify_all()

    # ------------------------------------------------------------ the thread that keeps workers waiting

    def _keep(self) -> None:
        while True:
            with self._lock:
                while not self._closing and not self._is_short():
                    if not self._changed.wait(timeout=1.0 if self._leaving else None):
                        break  # time to look after those that leave
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
        """Replace the workers that wait: the next ones are born with more modules."""
        with self._lock:
            self._generation += 1
            stale = [worker for worker in self._waiting if isinstance(worker, _Worker)]
            self._waiting.clear()
            for worker in stale:
                worker.leave()
            self._leaving += stale
            self._changed.notify_all()

    def _is_short(self) -> bool:
        return len(self._waiting) < self.settings.standby + self._wanted

    def _add_worker(self) -> None:
        worker: _Worker | Exception
        generation = self._generation
        try:
            worker = _Worker(self.context, self._service)
        except Exception as exc:  # no descriptors, no memory, a preload that fails the second time
            worker = exc
        with self._lock:
            if isinstance(worker, Exception):
                self._changed.wait_for(lambda: self._closing or self._wanted)  # somebody to tell
            elif generation != self._generation and not self._closing:
                worker.leave()
                self._leaving.append(worker)
                return
            self._waiting.append(worker)
            self._changed.notify_all()


class _NotBegunError(WorkerDiedError):
    """A worker ended before it began its task."""


class _Worker:
    """One process that waits for tasks, and our end of the connection to it."""

    def __init__(self, context: WorkerContext, service: "_Service") -> None:
        self.connection, theirs = context.Pipe()
        self.process: WorkerProcess = context.Process(target=service.serve, args=(theirs,))
        self.served = 0
        self.device: str | None = None  # that it computes on, since its first task
        self._left = 0.0
        with theirs:
            self.process.start()

    def call(self, message: bytes, task: Task) -> bytes:
        """Have it run a packed task.

        Raises
        ------
        WorkerDiedError
            It ended instead of answering; _NotBegunError if it had not begun: another may have the task.
        """
        begun = False
        try:
            with await_reader(self.process.pid, len(message)):
                self.connection.send_bytes(message)
            await_beginning(self.connection, self.process)
            begun = True
            reply = receive(self.connection, self.process)
        except (OSError, EOFError):
            end_process(self.process)  # in case it has only closed its end: it cannot answer any more
            self.process.join()
        else:
            self.served += 1
            return reply
        error = WorkerDiedError if begun else _NotBegunError
        raise error(self.process.pid, exit_code(self.process), task.name)

    def leave(self) -> None:
        """Let it end: it does when it has answered, or when it sees that nobody will ask."""
        self.connection.close()
        self._left = time.monotonic()

    def is_gone(self) -> bool:
        """Return whether it has ended; one that does not is killed after a while."""
        if self.process.is_alive():
            if time.monotonic() > self._left + LEAVE_SECONDS:
                end_process(self.process)
            return False
        self.process.join()
        self.process.close()
        return True

    def end(self) -> None:
        """Wait for its end, and bring it about if need be."""
        self.process.join(LEAVE_SECONDS)
        end_process(self.process)
        self.process.join()
        self.process.close()


def _fits(worker: "_Worker | Exception", task: Task) -> bool:
    return isinstance(worker, Exception) or worker.device in (None, task.device)


@dataclass(frozen=True, slots=True)
class _Service:
    """What a worker does: it is set up, then runs what comes.

    Attributes
    ----------
    wanted : WorkerSetup
    tasks : int
        How many it runs.
    rehearsal : bytes
        A task that does nothing. Run beforehand, so that what every task needs is there when the first comes.
    """

    wanted: WorkerSetup
    tasks: int
    rehearsal: bytes

    def prepare(self) -> None:
        """Rehearse in the template: what the interpreter learns from it, no worker has to."""
        os.environ.update(self.wanted.environ)
        rehearse_stderr()
        for _ in range(REHEARSALS):
            run(self.rehearsal)

    def serve(self, connection: Connection) -> None:
        """Run in the worker."""
        setup(self.wanted)
        run(self.rehearsal)  # copies from the template what it writes to
        for _ in range(self.tasks):
            try:
                message = connection.recv_bytes()
            except EOFError:
                return
            serve(connection, message)
            if hasattr(os, "sched_yield"):
                os.sched_yield()  # Linux wakes the caller on this core: let it not wait for our end
