"""The queue of an executor and its slots: which tasks wait, which run, how often, and with what outcome.

A *slot* is one of the ``max_workers`` places in which one task runs at a time: a thread that takes a task
from the queue and hands it to the backend. So a backend never holds more tasks than can run: tasks that wait
can still be cancelled, and a broken pool harms only the tasks that were running.
"""

import concurrent.futures
import logging
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from fedexec._scheduling import exit_hooks
from fedexec._scheduling.admission import Admission, Footprint
from fedexec._scheduling.attempts import Attempts
from fedexec._scheduling.futures import Future, Stats, copy_of
from fedexec._scheduling.limit_enforcer import LimitEnforcer
from fedexec._system.available_resources import SIGKILL
from fedexec._worker.seeding import derive
from fedexec.devices.device import Device
from fedexec.errors import (
    InitializerError,
    PreloadError,
)
from fedexec.interface import Backend, Capability, Node, Outcome, Task
from fedexec.settings import Settings

__all__ = ["Scheduler"]

log = logging.getLogger("fedexec")


class Scheduler:
    """The queue and the slots of one executor.

    The threads of the slots refer to the scheduler and not to the executor, so that the executor can be
    collected while tasks run.

    Parameters
    ----------
    backend : Backend
        Has been started.
    settings : Settings
    admission : Admission
    devices : sequence of Device
    """

    def __init__(
        self, backend: Backend, settings: Settings, admission: Admission, devices: Sequence[Device]
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._admission = admission
        self._attempts = Attempts(backend, admission)
        self._pid = os.getpid()
        # Enter this lock and not the condition: Ctrl+C in Condition.__enter__ could leave it locked for ever.
        self._lock = threading.RLock()  # guards everything below
        self._changed = threading.Condition(self._lock)
        self._queue: deque[tuple[Task, Future[Any]]] = deque()
        self._running: dict[Task, Future[Any]] = {}
        self._threads: list[threading.Thread] = []  # all slots that were ever opened
        self._slots: set[threading.Thread] = set()  # the slots that have not ended
        self._joining: set[threading.Thread] = set()  # slots whose done-callback waits for the other slots
        self._free = 0  # slots that run no task, including those that have just been opened
        self._closing = False
        self._killing = False
        self._broken: InitializerError | PreloadError | None = None
        self._counts: Counter[str] = Counter()
        self._backend_ended = False
        self._limit_enforcer: LimitEnforcer | None = None
        if Capability.REMOTE in backend.capabilities:
            backend.slots_changed = self._slots_changed
        elif settings.enforce_limits and Capability.KILLS_ONE in backend.capabilities:
            end = self._attempts.end_for_memory
            self._limit_enforcer = LimitEnforcer(settings, devices, self.running, end)
        exit_hooks.register(self)

    def submit(self, task: Task) -> Future[Any]:
        """Queue a task.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Future

        Raises
        ------
        RuntimeError
            The executor has been shut down, or belongs to another process.
        BrokenProcessPool
            An initializer or a preload has failed.
        """
        self._refuse_forked_copy()
        future: Future[Any] = Future()
        with self._lock:
            if self._broken is not None:
                raise copy_of(self._broken)
            if self._closing:
                when = "interpreter shutdown" if exit_hooks.interpreter_ends() else "shutdown"
                raise RuntimeError(f"cannot schedule new futures after {when}")
            if self._settings.seed is not None:
                task.seed = derive(self._settings.seed, self._counts["submitted"])
            self._queue.append((task, future))
            self._counts["submitted"] += 1
            if self._free >= len(self._queue):
                self._changed.notify_all()  # not notify(): the one thread could be waiting for something else
            elif len(self._slots) < self._most_slots():
                self._open_slot()
            if self._closing and (task, future) in self._queue:  # closed by a signal handler after the check
                self._queue.remove((task, future))
                self._counts["submitted"] -= 1
                raise RuntimeError("cannot schedule new futures after shutdown")
        return future

    def _most_slots(self) -> int:
        now = self._backend.slots()
        return self._settings.max_workers if now is None else min(self._settings.max_workers, max(now, 1))

    def _slots_changed(self) -> None:
        """Open slots for tasks that wait, because nodes have come; a slot without a node waits for one."""
        with self._lock:
            for _ in range(min(len(self._queue) - self._free, self._most_slots() - len(self._slots))):
                self._open_slot()
            self._changed.notify_all()

    def close(self, *, cancel_futures: bool = False, kill: int = 0) -> None:
        """Accept no more tasks. Returns at once.

        Parameters
        ----------
        cancel_futures : bool
            Whether to cancel the tasks that have not begun.
        kill : int
            Signal that the workers of the tasks that run get; 0 if they are to go on.
        """
        if self._is_forked_copy():
            return
        with self._lock:
            unused = not self._slots and not self._closing
            self._closing = True
            self._killing |= bool(kill)
            waiting = list(self._queue)
            kept = self._free_slots(kill=bool(kill)) if cancel_futures else len(waiting)
            self._queue, cancelled = deque(waiting[:kept]), waiting[kept:]
            self._counts["cancelled"] += len(cancelled)
            running = list(self._running)
            self._changed.notify_all()
        for _, future in cancelled:
            future.cancel()
            future.set_running_or_notify_cancel()
        if kill and Capability.KILLS_ONE in self._backend.capabilities:
            for task in running:
                self._attempts.kill(task, kill)
        if kill == SIGKILL:
            self._backend.kill_waiting()
        if unused:
            self._end_backend()

    def _free_slots(self, *, kill: bool) -> int:
        """Return how many tasks of the queue count as begun, because a free slot is about to take them.

        On a machine that is less busy they would have begun already. The number is 0 if all tasks are to end
        at once, or if memory decides when a task begins.
        """
        return 0 if kill or self._settings.auto else self._free

    def end(self, future: concurrent.futures.Future[Any], number: int = SIGKILL) -> None:
        """Cancel a task that waits, or end the worker of a task that runs if the backend can do that.

        Parameters
        ----------
        future : Future
            The future of the task.
        number : int
            Number of the signal that the worker gets.
        """
        self._refuse_forked_copy()
        if future.cancel():
            return
        with self._lock:
            task = next(
                (task for task, running_future in self._running.items() if running_future is future), None
            )
        if task is not None and Capability.KILLS_ONE in self._backend.capabilities:
            self._attempts.kill(task, number)

    def join(self) -> None:
        """Wait until all tasks are done and the backend has ended.

        A done-callback runs in a slot and cannot wait for its own slot: there this waits for the other slots
        only. Slots that wait here at the same time do not wait for each other. If a signal handler has
        interrupted a method that has the lock, waiting for the condition releases it.
        """
        if self._is_forked_copy():
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
            self._changed.wait_for(lambda: self._backend_ended)
        for thread in threads:
            if thread is not me:
                thread.join()

    def stats(self) -> Stats:
        """Return counts of what has been done so far."""
        self._refuse_forked_copy()
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

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes on which tasks run."""
        self._refuse_forked_copy()
        return self._backend.nodes()

    def rehearse(self, call: Callable[[], object], name: str) -> str | None:
        """Rehearse a call; see :meth:`fedexec.interface.Backend.rehearse` for parameters and result."""
        self._refuse_forked_copy()
        with self._lock:
            if self._closing:
                raise RuntimeError("cannot rehearse after shutdown")
        return self._backend.rehearse(call, name)

    def running(self) -> list[Task]:
        """Return the tasks that run now."""
        self._refuse_forked_copy()
        with self._lock:
            return list(self._running)

    def footprints(self) -> dict[str, Footprint]:
        """Return the footprint of each kind of task, by name of the kind."""
        self._refuse_forked_copy()
        with self._lock:
            return {**self._admission.footprints(), **self._backend.footprints()}

    # ------------------------------------------------------------ in a forked copy of the process

    def _is_forked_copy(self) -> bool:
        """Return whether this process was forked from the executor's, so that the slots do not exist here.

        In such a process no lock may be taken, because one of the missing threads may have held it.
        """
        return os.getpid() != self._pid

    def _refuse_forked_copy(self) -> None:
        if self._is_forked_copy():
            raise RuntimeError(
                f"This executor belongs to process {self._pid}. This is process {os.getpid()}, which was "
                "forked from it and cannot use the executor: make an executor here."
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
            is_refusal = isinstance(exc, Exception)  # otherwise Ctrl+C, perhaps after the thread has started
            if is_refusal or not begun.wait(1.0):
                self._slots.discard(slot)
                self._threads.remove(slot)
                self._free -= 1
                if not self._slots:  # if there is another slot, the task waits for that slot
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
            except BaseException:  # a done-callback that raises SystemExit must not end the slot
                log.exception("a done-callback raised an exception that is not a subclass of Exception")
            del entry  # do not keep the arguments of a finished task alive while waiting for the next task
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
                while not (self._queue and self._has_room() and self._admission.admit(self._queue[0][0])):
                    if self._closing and not self._queue:
                        return None
                    self._changed.wait()
                task, future = self._queue.popleft()
                self._running[task] = future
                return task, future
            finally:
                self._free -= 1

    def _has_room(self) -> bool:
        return len(self._running) < self._most_slots()

    def _serve(self, task: Task, future: Future[Any]) -> None:
        if not future.set_running_or_notify_cancel():
            self._runs_again(task, None)
            return
        future.started = time.time()
        outcome = self._attempts.run(task, self._count, lambda: self._killing)
        while self._runs_again(task, outcome):
            outcome = self._attempts.run(task, self._count, lambda: self._killing)
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
            del outcome, future  # avoid a reference cycle: the traceback of an error holds this frame

    def _runs_again(self, task: Task, outcome: Outcome | None) -> bool:
        """Release the memory of a task; return whether to run it again, after it can run alone."""
        with self._lock:
            again = self._admission.release(task, outcome)
            self._changed.notify_all()
            if again:
                self._counts["retries"] += 1
                self._changed.wait_for(lambda: self._killing or self._admission.admit(task))
                if not self._killing:
                    return True
                self._admission.give_up(task)
            # Under the same lock: nobody may see the task run beside the task that gets its memory.
            self._running.pop(task, None)
            if outcome is None:
                self._counts["cancelled"] += 1
            else:
                self._counts["succeeded" if outcome.exception is None else "failed"] += 1
            return False

    def _count(self, event: str) -> None:
        with self._lock:
            self._counts[event] += 1

    def _break(self, error: InitializerError | PreloadError) -> None:
        """Fail all waiting tasks and refuse new ones, because no worker can be set up."""
        with self._lock:
            self._broken = error
            waiting = list(self._queue)
            self._queue.clear()
            self._counts["failed"] += len(waiting)
        log.critical("%s", error, exc_info=error.__cause__)
        for _, future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(copy_of(error))

    def _end_backend(self) -> None:
        if self._limit_enforcer is not None:
            self._limit_enforcer.stop()
        try:
            self._backend.shutdown()
        finally:
            with self._lock:
                self._backend_ended = True
                self._changed.notify_all()
