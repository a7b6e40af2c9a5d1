"""Backends built on pools: each slot has a pool of its own, with one worker.

When one worker of a shared pool dies, the whole pool breaks, and the pool cannot tell which task was to
blame. With one pool per slot, a death, a kill or a restart affects one task only. The price is one more
management thread per slot, and nothing per task.

The pool starts the worker, gives it the task and replaces it. This module does not rely on how the pool
handles a worker's death: a pool does not notice a death in the middle of an answer, its locks stay locked if
their owner dies, and CPython 3.11 forgets a task that is submitted while the pool notices the death.
Therefore a worker answers over a pipe of its own, which ends with the worker, and shares no lock.
"""

import functools
import multiprocessing
import signal
import threading
from abc import abstractmethod
from concurrent.futures import Executor as Pool

from fedexec.backend import (
    BackendUnavailableError,
    Capability,
    Hooks,
    IsolatingBackend,
    Outcome,
    Settings,
    Task,
    WorkerContext,
    WorkerSetup,
)
from fedexec_backends._single_worker_pool import Slot, SlotContext

__all__ = ["PooledBackend"]


class PooledBackend(IsolatingBackend):
    """Runs each task in the pool of a free slot.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks

    Raises
    ------
    BackendUnavailableError
        The system provides no semaphores, which pools need.
    """

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        _require_semaphores(settings.backend)
        super().__init__(settings, hooks)
        self._slots = [Slot(self) for _ in range(settings.max_workers)]
        self._lock = threading.RLock()  # guards the list of free slots
        self._changed = threading.Condition(self._lock)
        self._free = self._slots[::-1]  # The last slot in the list was used last, so its worker is warm.

    @abstractmethod
    def make_pool(self, context: WorkerContext, worker_setup: WorkerSetup) -> Pool:
        """Make a pool with one worker that first calls ``setup(worker_setup)``.

        Parameters
        ----------
        context : WorkerContext
            The pool's ``mp_context``.
        worker_setup : WorkerSetup

        Returns
        -------
        Executor
        """

    def run(self, task: Task) -> Outcome:
        """Run one task in a free slot.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Outcome
        """
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
        """Take a free slot, preferably one whose worker already uses the task's device."""
        with self._lock:
            self._changed.wait_for(lambda: self._free)
            fitting = [slot for slot in self._free if slot.device in (None, task.device)]
            slot = (fitting or self._free)[-1]
            self._free.remove(slot)
        if not fitting:
            slot.retire()
        return slot

    def renew_workers(self) -> None:
        """Mark workers that were started ahead of their task: workers with the new modules replace them."""
        if Capability.FRESH_PROCESS in self.capabilities:  # Other workers import a module once for all tasks.
            for slot in self._slots:
                slot.is_stale = True

    def after(self, slot: "Slot", task: Task, outcome: Outcome) -> None:
        """Check a slot after a task, before the slot gets the next task.

        Parameters
        ----------
        slot : Slot
        task : Task
        outcome : Outcome
        """

    def kill(self, task: Task, number: int = signal.SIGKILL) -> None:
        """Send a signal to the worker that runs `task`.

        Parameters
        ----------
        task : Task
        number : int
            The signal; SIGKILL by default.
        """
        for slot in self._slots:
            slot.kill(task, number)

    def shutdown(self) -> None:
        """End every pool, then the template."""
        for slot in self._slots:
            slot.close()
        super().shutdown()

    def new_pool(self, slot: "Slot") -> Pool:
        """Make the pool of one slot; the pool reports each process that it starts to the slot.

        Parameters
        ----------
        slot : Slot

        Returns
        -------
        Executor
        """
        return self.make_pool(SlotContext(self.launcher, slot), self.worker_setup)


def _require_semaphores(backend: str) -> None:
    """Raise BackendUnavailableError if the system provides no semaphores, which the queues of pools need.

    A semaphore of the context "fork" has no name, so no resource tracker has to know it.
    """
    try:
        multiprocessing.get_context("fork").Semaphore()
    except (ImportError, OSError) as exc:
        reason = f"this system gives no semaphores, which lie in /dev/shm ({exc}); use standby or process"
        raise BackendUnavailableError(backend, reason) from exc
