"""A pool with one worker, for one slot: it gets tasks, tells apart how workers die, and is replaced."""

import multiprocessing
import threading
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures import Executor as Pool
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

from fedexec.backend import (
    Launcher,
    Task,
    Usage,
    WorkerContext,
    WorkerDiedError,
    WorkerProcess,
    await_answer,
    await_beginning,
    end_process,
    exit_code,
    receive,
    serve,
    start_watching,
)

__all__ = ["Slot", "SlotContext"]

ATTEMPTS = 4  # how many workers may end before they begin a task, until the task fails


class PoolMaker(Protocol):
    """What a slot needs of its backend; see :class:`fedexec_backends._pooled_backend.PooledBackend`."""

    def new_pool(self, slot: "Slot", /) -> Pool:
        """Make the pool of a slot.

        Parameters
        ----------
        slot : Slot

        Returns
        -------
        Executor
        """


class Slot:
    """A place for one task at a time: a pool with one worker, which is replaced when it breaks.

    Parameters
    ----------
    backend : PooledBackend
    """

    def __init__(self, backend: PoolMaker) -> None:
        self._backend = backend
        self.device: str | None = None  # device that the worker uses, if the worker serves more tasks
        self.is_stale = False  # whether the worker lacks modules that new workers have
        self._pool: Pool | None = None
        self._retired: Pool | None = None
        # guards `_task` and `_workers`; used itself, because Ctrl+C can break `with self._changed`
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._task: Task | None = None
        self._workers: list[_Worker] = []  # the pool's worker, and the next one if the first has served

    def call(self, task: Task, message: bytes) -> bytes:
        """Run one packed task in a worker.

        Parameters
        ----------
        task : Task
        message : bytes
            The packed task.

        Returns
        -------
        bytes
            The packed reply.

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
            if task.doomed:  # The signal may reach the worker only now, when it is idle.
                self._discard()
        assert isinstance(answer, _Death)
        try:
            raise answer.error or WorkerDiedError(answer.pid, answer.exitcode, task.name)
        finally:
            del answer  # avoids a reference cycle

    def _attempt(self, task: Task, message: bytes) -> "bytes | _Death":
        """Submit a task to the pool, and wait for the answer or the worker's end."""
        if self._pool is None:
            self._pool = self._backend.new_pool(self)
        try:
            future = self._pool.submit(_run, message)
        except BrokenExecutor:
            return self._report_death(self._workers[-1] if self._workers else None)
        future.add_done_callback(self._notify)
        ended = None
        while (worker := self._await_worker(future)) is not None:
            try:
                await_beginning(worker.answers, worker)
                break
            except (OSError, EOFError):
                # A worker that has served may have ended as it should: the pool then reports that or starts
                # the next worker. A fresh worker should not have ended, and the pool may have lost the task.
                if not worker.has_served:
                    return self._report_death(worker)
            with self._lock:
                self._workers.remove(worker)
            ended = worker
        else:
            return self._report_death(ended)
        task.pid = worker.pid
        try:
            answer = receive(worker.answers, worker)
        except (OSError, EOFError):
            error = future.exception()
            return self._report_death(
                worker, begun=True, error=None if isinstance(error, BrokenExecutor) else error
            )
        if future.exception() is None:
            worker.has_served = True
        else:
            self._discard()  # The worker has ended just after its answer.
        return answer

    def _await_worker(self, future: Future[None]) -> "_Worker | None":
        """Wait for the first worker that has not ended; return None if the pool breaks instead."""
        with self._lock:
            self._changed.wait_for(lambda: self._workers or future.done())
            return self._workers[0] if self._workers else None

    def _report_death(
        self, worker: "_Worker | None", *, begun: bool = False, error: BaseException | None = None
    ) -> "_Death":
        """Drop the pool, and return how its worker ended."""
        self._discard()
        if worker is None:
            return _Death(None, None, begun, error)
        return _Death(worker.pid, exit_code(worker), begun, error)

    def _notify(self, _: Future[None]) -> None:
        with self._lock:
            self._changed.notify_all()

    def started(self, worker: "_Worker") -> None:
        """Note a process that the pool has started.

        Parameters
        ----------
        worker : _Worker
        """
        with self._lock:
            self._workers.append(worker)
            if self._task is not None and self._task.doomed:
                end_process(worker)
            self._changed.notify_all()

    def kill(self, task: Task, number: int) -> None:
        """Send a signal to the slot's workers if the slot runs `task`.

        Parameters
        ----------
        task : Task
        number : int
            The signal.
        """
        with self._lock:
            if self._task is task:
                # The pool may wait for a worker that has served but does not end, so that worker gets the
                # signal, too.
                for worker in self._workers:
                    end_process(worker, number)

    def retire(self, usage: Usage | None = None) -> None:
        """Let the next task have a new worker; wait for the old one's end only if it may free device memory.

        Parameters
        ----------
        usage : Usage, optional
            What the last task used; None: there is nothing to wait for.
        """
        if self._retired is not None:
            self._retired.shutdown(wait=True)
        self._retired, self._pool, self.device = self._pool, None, None
        with self._lock:
            workers, self._workers = self._workers, []
        if self._retired is not None:
            _shut_down(self._retired, workers, wait=usage is not None and usage.may_hold_device)

    def await_end(self, usage: Usage | None) -> None:
        """Wait for the end of the worker that ran a task, if the worker may hold device memory.

        Parameters
        ----------
        usage : Usage or None
            What the task used.
        """
        if usage is None or not usage.may_hold_device:
            return
        with self._lock:
            workers = [worker for worker in self._workers if worker.pid == usage.worker_pid]
        # The list is empty if the pool has noticed the worker's end and started the next worker.
        for worker in workers:
            worker.join()

    def close(self) -> None:
        """Let the worker end; return when it is gone."""
        if self._retired is not None:
            self._retired.shutdown(wait=True)
        self._retired = None
        self._discard(kill=False)

    def _discard(self, *, kill: bool = True) -> None:
        """Drop the pool; when this method returns, the pool's processes have been reaped."""
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
            # A task whose worker died before reading it fills the pipe, and the pipe's reading end is also
            # open here. If it stayed open, the thread of a broken loky pool would write to it for ever
            # (CPython closes this end since gh-94777).
            queue._reader.close()
        with self._lock:
            workers, self._workers = self._workers, []
        for worker in workers:
            worker.join()  # A broken loky pool does not join, and multiprocessing keeps unjoined processes.


def _shut_down(pool: Pool, workers: "list[_Worker]", *, wait: bool = True) -> None:
    """Shut a pool down; meanwhile, end workers that are stopped, because the pool waits for its workers."""

    def watch() -> None:
        for worker in workers:
            if not await_answer([worker.sentinel], worker.pid):
                end_process(worker)

    watcher = start_watching(watch, "fedexec-watch-pool")
    pool.shutdown(wait=wait)
    if wait and watcher is not None:
        watcher.join()


class _Death(NamedTuple):
    """How a worker ended: numbers, not the handle, whose pipes a long-lived exception would keep open."""

    pid: int | None
    exitcode: int | None
    begun: bool
    error: BaseException | None  # what the pool reports instead of a worker that could not answer


class SlotContext(WorkerContext):
    """The context of a slot's pool.

    Parameters
    ----------
    launcher : Launcher
        Starts the pool's processes.
    slot : Slot
        Learns of each process.
    """

    def __init__(self, launcher: Launcher, slot: Slot) -> None:
        super().__init__(launcher)
        self._slot = slot

    def Process(self, *args: Any, **kwargs: Any) -> "_Worker":  # type: ignore[override]  # noqa: N802
        """Make a worker that reports to the slot.

        Parameters
        ----------
        *args, **kwargs
            As for :meth:`fedexec.backend.WorkerContext.Process`.

        Returns
        -------
        _Worker
        """
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
    slot : Slot
        Learns that the worker has started.
    answers : Connection
        The caller's end of the pipe.
    answering : Connection
        The worker's end of the pipe.
    has_served : bool
        Whether the worker has answered a task.
    """

    slot: Slot
    answers: Connection
    answering: Connection
    has_served = False
    _stays_here = (*WorkerProcess._stays_here, "slot", "answers")

    def start(self) -> None:
        """Start the worker, and report it to the slot."""
        self.answers, self.answering = multiprocessing.Pipe(duplex=False)
        with self.answering:
            super().start()
        self.slot.started(self)


class _Lock:
    """A lock between threads of one process, in place of a lock that a pool would share with its workers.

    A pool here has one worker at a time, so there is nothing to guard. But a worker that is killed just after
    its answer could leave a shared lock locked, and the next worker would wait for ever.
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


SlotContext.worker_class = _Worker


def _run(message: bytes) -> None:
    """Run one packed task, in the worker."""
    worker = multiprocessing.current_process()
    assert isinstance(worker, _Worker)
    try:
        serve(worker.answering, message)
    except BaseException:
        worker.answering.close()  # Then the slot asks the pool, which knows the reason.
        raise
