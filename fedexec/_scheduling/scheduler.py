"""The queue of an executor and its slots: what waits, what runs, how often, and what becomes of it.

A *slot* is a thread that takes one task at a time from the queue and hands it to the backend. There are
``max_workers`` of them, so that a backend never holds more tasks than can run: what waits stays cancellable,
and a broken pool can hurt only what was running.
"""

import concurrent.futures
import functools
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fedexec._scheduling import exit_hooks
from fedexec._scheduling.admission import Admission, Footprint
from fedexec._scheduling.deadline import TaskDeadline
from fedexec._scheduling.futures import Future, Stats
from fedexec._scheduling.limit_enforcer import Watch
from fedexec._system.machine import SIGKILL
from fedexec._worker.seeding import derive
from fedexec.devices.device import Device
from fedexec.errors import (
    InitializerError,
    PreloadError,
    TaskTimeoutError,
    WorkerDiedError,
    WorkerMemoryError,
)
from fedexec.interface import Backend, Capability, Outcome, Task
from fedexec.settings import Settings

__all__ = ["Scheduler"]

log = logging.getLogger("fedexec")
T = TypeVar("T")


class Scheduler:
    """Queue and slots of one executor. Its threads hold it, not the executor, which may be collected."""

    def __init__(
        self, backend: Backend, settings: Settings, admission: Admission, devices: Sequence[Device]
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._admission = admission
        self._pid = os.getpid()
        # A lock to be taken as it is: in the Condition's own __enter__ Ctrl+C could leave it locked for ever.
        self._lock = threading.RLock()  # guards everything below
        self._changed = threading.Condition(self._lock)
        self._queue: deque[tuple[Task, Future[Any]]] = deque()
        self._running: dict[Task, Future[Any]] = {}
        self._threads: list[threading.Thread] = []  # every slot there ever was
        self._slots: set[threading.Thread] = set()  # those that have not ended
        self._joining: set[threading.Thread] = set()  # those whose callback waits for the others
        self._free = 0  # slots that run no task, those included that have only just been opened
        self._closing = False
        self._killing = False
        self._broken: InitializerError | PreloadError | None = None
        self._counts: Counter[str] = Counter()
        self._gone = threading.Event()  # the backend is shut down
        self._excesses: dict[int, WorkerMemoryError] = {}  # task id -> why it is being ended
        self._watch: Watch | None = None
        if settings.enforce_limits and Capability.KILLS_ONE in backend.capabilities:
            self._watch = Watch(settings, devices, self.running, self._end_for_memory)
        exit_hooks.register(self)

    def submit(self, task: Task) -> Future[Any]:
        """Queue a task; RuntimeError after shutdown, BrokenProcessPool after an initializer failed."""
        self._refuse_elsewhere()
        future: Future[Any] = Future()
        with self._lock:
            if self._broken is not None:
                raise _copy_of(self._broken)
            if self._closing:
                when = "interpreter shutdown" if exit_hooks.interpreter_ends() else "shutdown"
                raise RuntimeError(f"cannot schedule new futures after {when}")
            if self._settings.seed is not None:
                task.seed = derive(self._settings.seed, self._counts["submitted"])
            self._queue.append((task, future))
            self._counts["submitted"] += 1
            if self._free >= len(self._queue):
                self._changed.notify_all()  # not one: it could be one that waits for something else
            elif len(self._slots) < self._settings.max_workers:
                self._open_slot()
        return future

    def close(self, *, cancel_futures: bool = False, kill: bool = False) -> None:
        """Take no more; with `kill`, end the workers of what runs. Returns at once."""
        if self._is_elsewhere():
            return
        with self._lock:
            unused = not self._slots and not self._closing
            self._closing = True
            self._killing |= kill
            waiting = list(self._queue)
            kept = self._count_begun(kill=kill) if cancel_futures else len(waiting)
            self._queue, cancelled = deque(waiting[:kept]), waiting[kept:]
            self._counts["cancelled"] += len(cancelled)
            running = list(self._running)
            self._changed.notify_all()
        for _, future in cancelled:
            future.cancel()
            future.set_running_or_notify_cancel()
        if kill and Capability.KILLS_ONE in self._backend.capabilities:
            for task in running:
                self._kill(task)
        if unused:
            self._end_backend()

    def _count_begun(self, *, kill: bool) -> int:
        """Return how many tasks of the queue have a slot that has only not had the time to take them yet.

        They count as begun, as they would on a machine that is less busy, unless all is to end at once, or
        memory decides when they begin.
        """
        return 0 if kill or self._settings.auto else self._free

    def end(self, future: concurrent.futures.Future[Any]) -> None:
        """Cancel a task that waits; end the worker of one that runs, if the backend can."""
        self._refuse_elsewhere()
        if future.cancel():
            return
        with self._lock:
            task = next((task for task, its in self._running.items() if its is future), None)
        if task is not None and Capability.KILLS_ONE in self._backend.capabilities:
            self._kill(task)

    def join(self) -> None:
        """Wait until nothing is left; called from a slot (a done-callback), for the other slots only.

        Slots that wait here at the same time do not wait for each other.
        """
        if self._is_elsewhere():
            return
        me = threading.current_thread()
        with self._lock:
            threads = list(self._threads)
            if me in self._slots:
                self._joining.add(me)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._slots <= self._joining)
                self._joining.discard(me)
                return
        self._gone.wait()
        for thread in threads:
            if thread is not me:
                thread.join()

    def stats(self) -> Stats:
        """Return what has been done so far."""
        self._refuse_elsewhere()
        with self._lock:
            counts = self._counts
            return Stats(
                submitted=counts["submitted"],
                succeeded=counts["succeeded"],
                failed=counts["failed"],
                cancelled=counts["cancelled"],
                running=len(self._running),
                queued=len(self._queue),
                worker_deaths=counts["worker_deaths"],
                timeouts=counts["timeouts"],
                retries=counts["retries"],
                memory_kills=counts["memory_kills"],
                restarts=dict(self._backend.restarts()),
                learning=dict(self._backend.learning()),
            )

    def rehearse(self, call: Callable[[], object], name: str) -> str | None:
        """Have workers be born with what a call leaves in memory; see :meth:`fedexec.Executor.rehearse`."""
        self._refuse_elsewhere()
        with self._lock:
            if self._closing:
                raise RuntimeError("cannot rehearse after shutdown")
        return self._backend.rehearse(call, name)

    def running(self) -> list[Task]:
        """Return the tasks that run now."""
        self._refuse_elsewhere()
        with self._lock:
            return list(self._running)

    def footprints(self) -> dict[str, Footprint]:
        """Return kind of task to what it takes."""
        self._refuse_elsewhere()
        with self._lock:
            return self._admission.footprints()

    # ------------------------------------------------------------ in a process that was forked

    def _is_elsewhere(self) -> bool:
        """Return whether this process was forked from the executor's, whose threads do not exist here.

        Then no lock may be taken: one of them may have held it.
        """
        return os.getpid() != self._pid

    def _refuse_elsewhere(self) -> None:
        if self._is_elsewhere():
            raise RuntimeError(
                f"This executor belongs to process {self._pid}, and this is process {os.getpid()}, which was "
                "forked from it: make an executor here."
            )

    # ------------------------------------------------------------ a slot's life

    def _open_slot(self) -> None:
        begun = threading.Event()
        slot = threading.Thread(target=self._work, args=(begun,), name=f"fedexec-slot-{len(self._slots)}")
        self._slots.add(slot)
        self._threads.append(slot)
        self._free += 1
        try:
            slot.start()
        except BaseException as exc:
            is_refusal = isinstance(exc, Exception)  # else it is Ctrl+C, which may come after the start
            if is_refusal or not begun.wait(1.0):
                self._slots.discard(slot)
                self._threads.remove(slot)
                self._free -= 1
                if not self._slots:  # with another slot the task waits for that one
                    self._queue.pop()
                    self._counts["submitted"] -= 1
                    raise
            if not is_refusal:
                raise

    def _work(self, begun: threading.Event) -> None:
        begun.set()
        while (entry := self._next()) is not None:
            try:
                self._serve(*entry)
            except BaseException:  # a done-callback that raised SystemExit must not take the slot along
                log.exception("a callback ended with something that is no Exception")
            del entry  # keep no finished argument alive while waiting for the next task
            with self._lock:
                self._free += 1
        with self._lock:
            self._slots.discard(threading.current_thread())
            self._changed.notify_all()
            last = not self._slots
        if last:
            self._end_backend()

    def _next(self) -> tuple[Task, Future[Any]] | None:
        with self._lock:
            try:
                while not (self._queue and self._admission.admit(self._queue[0][0])):
                    if self._closing and not self._queue:
                        return None
                    self._changed.wait()
                task, future = self._queue.popleft()
                self._running[task] = future
                return task, future
            finally:
                self._free -= 1

    def _serve(self, task: Task, future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            self._runs_again(task, None)
            return
        future.started = time.time()
        outcome = self._run(task)
        while self._runs_again(task, outcome):
            outcome = self._run(task)
        future.ended = time.time()
        if isinstance(outcome.exception, InitializerError | PreloadError):
            self._break(outcome.exception)
        del task
        future.usage = outcome.usage
        try:
            if outcome.exception is None:
                future.set_result(outcome.value)
            else:
                future.set_exception(outcome.exception)
        finally:
            del outcome, future  # a traceback out of this very thread holds this frame: no cycle

    def _runs_again(self, task: Task, outcome: Outcome | None) -> bool:
        """Make room for others; after a task ran out of memory in company, wait until it has none."""
        with self._lock:
            again = self._admission.release(task, outcome)
            self._changed.notify_all()
            if again:
                self._counts["retries"] += 1
                self._changed.wait_for(lambda: self._killing or self._admission.admit(task))
                if not self._killing:
                    return True
                self._admission.give_up(task)
            # In the same breath: nobody may see it run beside the one that got its room.
            self._running.pop(task, None)
            if outcome is None:
                self._counts["cancelled"] += 1
            else:
                self._counts["succeeded" if outcome.exception is None else "failed"] += 1
            return False

    def _run(self, task: Task) -> Outcome:
        left = task.retries
        while True:
            try:
                return self._attempt(task)
            except WorkerDiedError as exc:
                self._count("worker_deaths")
                if not left or not task.repeatable or self._killing or task.doomed:
                    return Outcome(exception=exc.with_traceback(None))
                left -= 1
                log.warning("%s It is run again.", str(exc))  # whoever keeps the record keeps no frames
                self._count("retries")
            except TaskTimeoutError as exc:
                self._count("timeouts")
                return Outcome(exception=exc.with_traceback(None))
            except WorkerMemoryError as exc:
                self._count("memory_kills")
                return Outcome(exception=exc.with_traceback(None))
            except BaseException as exc:
                return Outcome(exception=exc)

    def _attempt(self, task: Task) -> Outcome:
        deadline = None
        if task.timeout is not None and Capability.KILLS_ONE in self._backend.capabilities:
            deadline = TaskDeadline(task, task.timeout, functools.partial(self._kill, task))
        try:
            with self._admission.measuring(task):
                return self._backend.run(task)
        except WorkerDiedError as exc:
            if task.id in self._excesses:
                raise self._excesses[task.id] from None
            if deadline is not None and deadline.passed:
                late = TaskTimeoutError(task.name, deadline.seconds, exc.pid)
                late.quote(exc.stderr)
                try:
                    raise late from None
                finally:
                    del late  # no cycle
            raise
        finally:
            self._excesses.pop(task.id, None)
            if deadline is not None:
                deadline.cancel()

    def _kill(self, task: Task, number: int = SIGKILL) -> None:
        task.doomed = True
        self._backend.kill(task, number)

    def _end_for_memory(self, task: Task, error: WorkerMemoryError) -> None:
        self._excesses[task.id] = error
        self._kill(task)

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1

    def _break(self, error: InitializerError | PreloadError) -> None:
        """No worker can be made ready: fail what waits, refuse what comes."""
        with self._lock:
            self._broken = error
            waiting = list(self._queue)
            self._queue.clear()
            self._counts["failed"] += len(waiting)
        log.critical("%s", error, exc_info=error.__cause__)
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(_copy_of(error))

    def _end_backend(self) -> None:
        if self._watch is not None:
            self._watch.stop()
        try:
            self._backend.shutdown()
        finally:
            self._gone.set()


def _copy_of(error: InitializerError | PreloadError) -> Exception:
    """Make an exception of its own for each future: tracebacks pile up in a shared one."""
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
