"""Backends built on a pool: one pool *with one worker* for each slot.

A shared pool breaks as a whole when one worker dies, and cannot tell which task was the guilty one. With a
pool for each slot a death, a kill or a restart touches one task by construction; it costs one more management
thread a slot and nothing per task.

The pool starts the worker, hands it the task and replaces it. What it makes of a death is not relied on: it
never learns of one in the middle of an answer, its locks stay locked if their owner dies, and CPython 3.11
forgets a task that is submitted while it finds out. So a worker answers over a pipe of its own, which ends
with it, and shares no lock.
"""

import functools
import multiprocessing
import signal
import threading
from abc import abstractmethod
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures import Executor as Pool
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from fedexec.backend import (
    BackendUnavailableError,
    Capability,
    Hooks,
    IsolatingBackend,
    Launcher,
    Outcome,
    Settings,
    Task,
    Usage,
    WorkerContext,
    WorkerDiedError,
    WorkerProcess,
    WorkerSetup,
    await_answer,
    await_beginning,
    end_process,
    exit_code,
    receive,
    serve,
    start_watching,
)

__all__ = ["PooledBackend", "Slot"]

ATTEMPTS = 4  # workers that may end before they begin a task, until that is what it is told


class PooledBackend(IsolatingBackend):
    """Runs each task in the pool of a free slot."""

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        _require_semaphores(settings.backend)
        super().__init__(settings, hooks)
        self._slots = [Slot(self) for _ in range(settings.max_workers)]
        self._lock = threading.RLock()  # guards what is free
        self._changed = threading.Condition(self._lock)
        self._free = self._slots[::-1]  # the last one is the one that was used last, and is warm

    @abstractmethod
    def make_pool(self, context: WorkerContext, wanted: WorkerSetup) -> Pool:
        """Make a pool with one worker that calls ``worker.setup(wanted)`` first."""

    def run(self, task: Task) -> Outcome:
        """Run one task in a free slot."""
        slot = self._take(task)
        try:
            outcome = self.channel.deliver(task, functools.partial(slot.call, task))
            self.after(slot, task, outcome)
        finally:
            with self._lock:
                self._free.append(slot)
                self._changed.notify()
        return outcome

    def _take(self, task: Task) -> "Slot":
        """Take a free slot, rather one whose worker is on the task's device already."""
        with self._lock:
            self._changed.wait_for(lambda: self._free)
            fitting = [slot for slot in self._free if slot.device in (None, task.device)]
            slot = (fitting or self._free)[-1]
            self._free.remove(slot)
        if not fitting:
            slot.retire()
        return slot

    def renew_workers(self) -> None:
        """Replace, before their next task, the workers that have started ahead and lack what was learnt."""
        if Capability.FRESH_PROCESS in self.capabilities:  # others have run tasks, and import once
            for slot in self._slots:
                slot.is_stale = True

    def after(self, slot: "Slot", task: Task, outcome: Outcome) -> None:
        """Look at a slot after a task, before it gets the next one."""

    def kill(self, task: Task, number: int = signal.SIGKILL) -> None:
        """End the worker that runs `task`."""
        for slot in self._slots:
            slot.kill(task, number)

    def shutdown(self) -> None:
        """End every pool, then the template."""
        for slot in self._slots:
            slot.close()
        super().shutdown()

    def new_pool(self, slot: "Slot") -> Pool:
        """Make the pool of one slot, which hears of every process the pool starts."""
        return self.make_pool(_SlotContext(self.launcher, slot), self.worker_setup)


def _require_semaphores(backend: str) -> None:
    """Raise BackendUnavailableError where the system gives none: the queues of pools are made of them.

    One of the context "fork" has no name that a resource tracker would have to be told.
    """
    try:
        multiprocessing.get_context("fork").Semaphore()
    except (ImportError, OSError) as exc:
        reason = f"this system gives no semaphores, which lie in /dev/shm ({exc}); use standby or process"
        raise BackendUnavailableError(backend, reason) from exc


class Slot:
    """One pool with one worker, replaced when it breaks."""

    def __init__(self, backend: PooledBackend) -> None:
        self._backend = backend
        self.device: str | None = None  # that its worker computes on, if it stays there
        self.is_stale = False  # its worker lacks modules that others are born with
        self._pool: Pool | None = None
        self._retired: Pool | None = None
        self._lock = threading.RLock()  # guards the two below; taken as it is, for Ctrl+C's sake
        self._changed = threading.Condition(self._lock)
        self._task: Task | None = None
        self._workers: list[_Worker] = []  # of the pool: one, and the next if that one has served

    def call(self, task: Task, message: bytes) -> bytes:
        """Have a worker run one packed task.

        Raises
        ------
        WorkerDiedError
            The worker died; the next call gets a new one.
        """
        if self.is_stale:
            self.is_stale = False
            self._discard(kill=False)
        with self._lock:
            self._task = task
        try:
            for _ in range(ATTEMPTS):
                answer = self._attempt(task, message)
                if isinstance(answer, bytes):
                    return answer
                if answer.begun or task.doomed:
                    break
        except BaseException:
            self._discard()
            raise
        finally:
            with self._lock:
                self._task = None
            if task.doomed:  # the signal may hit the worker only now, when it is idle
                self._discard()
        assert isinstance(answer, _Death)
        try:
            raise answer.error or WorkerDiedError(answer.pid, answer.exitcode, task.name)
        finally:
            del answer  # no cycle

    def _attempt(self, task: Task, message: bytes) -> "bytes | _Death":
        """Submit a task to the pool and wait for its answer, or for its worker's end."""
        if self._pool is None:
            self._pool = self._backend.new_pool(self)
        try:
            future = self._pool.submit(_run, message)
        except BrokenExecutor:
            return self._bury(self._workers[-1] if self._workers else None)
        future.add_done_callback(self._notify)
        ended = None
        while (worker := self._await_worker(future)) is not None:
            try:
                await_beginning(worker.answers, worker)
                break
            except (OSError, EOFError):
                # One that has served may have ended as it should, and the pool will say so or start the next.
                # A fresh one has not, and the pool may have forgotten the task over it.
                if not worker.has_served:
                    return self._bury(worker)
            with self._lock:
                self._workers.remove(worker)
            ended = worker
        else:
            return self._bury(ended)
        task.pid = worker.pid
        try:
            answer = receive(worker.answers, worker)
        except (OSError, EOFError):
            error = future.exception()
            return self._bury(worker, begun=True, error=None if isinstance(error, BrokenExecutor) else error)
        if future.exception() is None:
            worker.has_served = True
        else:
            self._discard()  # it ended just after its answer
        return answer

    def _await_worker(self, future: Future[None]) -> "_Worker | None":
        """Wait for the first worker that has not ended; None if the pool breaks instead."""
        with self._lock:
            self._changed.wait_for(lambda: self._workers or future.done())
            return self._workers[0] if self._workers else None

    def _bury(
        self, worker: "_Worker | None", *, begun: bool = False, error: BaseException | None = None
    ) -> "_Death":
        """Drop the pool, and tell how its worker ended."""
        self._discard()
        if worker is None:
            return _Death(None, None, begun, error)
        return _Death(worker.pid, exit_code(worker), begun, error)

    def _notify(self, _: Future[None]) -> None:
        with self._lock:
            self._changed.notify_all()

    def started(self, worker: "_Worker") -> None:
        """Take note of a process the pool has started."""
        with self._lock:
            self._workers.append(worker)
            if self._task is not None and self._task.doomed:
                end_process(worker)
            self._changed.notify_all()

    def kill(self, task: Task, number: int) -> None:
        """End the worker if it runs `task`."""
        with self._lock:
            if self._task is task:
                for worker in self._workers:  # one that has served and does not end too: the pool waits
                    end_process(worker, number)

    def retire(self, usage: Usage | None = None) -> None:
        """Give the next task a new worker; wait for this one's end only where device memory may come back."""
        if self._retired is not None:
            self._retired.shutdown(wait=True)
        self._retired, self._pool, self.device = self._pool, None, None
        with self._lock:
            workers, self._workers = self._workers, []
        if self._retired is not None:
            _shut_down(self._retired, workers, wait=usage is not None and usage.may_hold_device)

    def await_end(self, usage: Usage | None) -> None:
        """Wait for the end of the worker that ran a task, if it may hold device memory."""
        if usage is None or not usage.may_hold_device:
            return
        with self._lock:
            workers = [worker for worker in self._workers if worker.pid == usage.worker_pid]
        for worker in workers:  # none if the pool has seen its end, and started the next
            worker.join()

    def close(self) -> None:
        """Let the worker end. Returns when it is gone."""
        if self._retired is not None:
            self._retired.shutdown(wait=True)
        self._retired = None
        self._discard(kill=False)

    def _discard(self, *, kill: bool = True) -> None:
        """Drop the pool; when this returns, its processes have been reaped."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        with self._lock:
            workers = self._workers[:]
        if kill:
            for worker in workers:
                end_process(worker)
        queue: Any = getattr(pool, "_call_queue", None)
        _shut_down(pool, workers)
        if kill and queue is not None:
            # A task that its worker did not live to read fills the pipe, whose reading end is here too:
            # without this, a broken loky's thread writes to it for ever (CPython closes it since gh-94777).
            queue._reader.close()
        with self._lock:
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.join()  # a broken loky does not, and multiprocessing keeps what is not joined


def _shut_down(pool: Pool, workers: "list[_Worker]", *, wait: bool = True) -> None:
    """Shut a pool down. It waits for its workers: one that is, or comes to be, stopped is ended meanwhile."""

    def watch() -> None:
        for worker in workers:
            if not await_answer([worker.sentinel], worker.pid):
                end_process(worker)

    watching = start_watching(watch, "fedexec-watch-pool")
    pool.shutdown(wait=wait)
    if wait and watching is not None:
        watching.join()


class _Death(NamedTuple):
    """How a worker ended; numbers only, since exceptions live long and its handle has pipes."""

    pid: int | None
    exitcode: int | None
    begun: bool
    error: BaseException | None  # instead, what the pool reports of a worker that could not answer


class _SlotContext(WorkerContext):
    """Of a slot's pool."""

    def __init__(self, launcher: Launcher, slot: Slot) -> None:
        super().__init__(launcher)
        self._slot = slot

    def Process(self, *args: Any, **kwargs: Any) -> "_Worker":  # type: ignore[override]  # noqa: N802
        """Make a process that answers to the slot."""
        worker = super().Process(*args, **kwargs)
        assert isinstance(worker, _Worker)
        worker.slot = self._slot
        return worker

    def Lock(self) -> "_Lock":  # type: ignore[override]  # noqa: N802
        """Make a lock for the pool."""
        return _Lock()


class _Worker(WorkerProcess):
    """A pool's worker, with a pipe for its answers.

    Attributes
    ----------
    answers : Connection
        The caller's end.
    answering : Connection
        The worker's end.
    has_served : bool
    """

    slot: Slot
    answers: Connection
    answering: Connection
    has_served = False
    _stays_here = (*WorkerProcess._stays_here, "slot", "answers")

    def start(self) -> None:
        """Start it, then tell."""
        self.answers, self.answering = multiprocessing.Pipe(duplex=False)
        with self.answering:
            super().start()
        self.slot.started(self)


class _Lock:
    """A lock among the threads of a process, where a pool wants one that it shares with its workers.

    There is one worker at a time, so there is nothing to guard; but one that is killed just after its answer
    could leave the lock locked, for its successor to wait for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.release = self._lock.release

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        return self._lock.acquire(block, -1 if timeout is None else timeout)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


_SlotContext.worker_class = _Worker


def _run(message: bytes) -> None:
    """Run one packed task, in the worker."""
    worker = multiprocessing.current_process()
    assert isinstance(worker, _Worker)
    try:
        serve(worker.answering, message)
    except BaseException:
        worker.answering.close()  # so that the slot asks the pool, which is told why
        raise
