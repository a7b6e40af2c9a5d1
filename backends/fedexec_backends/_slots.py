"""Backends built on a pool: one pool *with one worker* for each slot.

A shared pool breaks as a whole when one worker dies, and cannot tell which task was the guilty one. With a
pool for each slot a death, a kill or a restart touches one task by construction; it costs one more management
thread a slot and nothing per task.
"""

import functools
import threading
from abc import abstractmethod
from concurrent.futures import BrokenExecutor
from concurrent.futures import Executor as Pool

from fedexec.courier import Courier
from fedexec.errors import WorkerDiedError
from fedexec.interface import Backend, Hooks, Outcome, Task, Usage
from fedexec.settings import Settings
from fedexec.worker import WorkerSetup, run
from fedexec_backends._context import Launcher, WorkerContext, WorkerProcess, end_process, exit_code

__all__ = ["PooledBackend", "Slot"]


class PooledBackend(Backend):
    """Runs each task in the pool of a free slot."""

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        super().__init__(settings, hooks)
        self._launcher = Launcher(settings, hooks, type(self).__module__)
        self._setup = WorkerSetup.of(settings, hooks)
        self._courier = Courier(shared_memory=settings.shared_memory)
        self._slots = [Slot(self) for _ in range(settings.max_workers)]
        self._changed = threading.Condition()  # guards the next
        self._free = self._slots[::-1]  # the last one is the one that was used last, and is warm

    @abstractmethod
    def make_pool(self, context: WorkerContext, wanted: WorkerSetup) -> Pool:
        """Make a pool with one worker that calls ``worker.setup(wanted)`` first."""

    def start(self) -> None:
        """Import the preload."""
        self._launcher.start()

    def run(self, task: Task) -> Outcome:
        """Run one task in a free slot."""
        slot = self._take(task)
        try:
            outcome = self._courier.deliver(task, functools.partial(slot.call, task))
            self.after(slot, task, outcome)
        finally:
            with self._changed:
                self._free.append(slot)
                self._changed.notify()
        return outcome

    def _take(self, task: Task) -> "Slot":
        """Take a free slot, rather one whose worker is on the task's device already."""
        with self._changed:
            self._changed.wait_for(lambda: self._free)
            fitting = [slot for slot in self._free if slot.device in (None, task.device)]
            slot = (fitting or self._free)[-1]
            self._free.remove(slot)
        if not fitting:
            slot.retire()
        return slot

    def after(self, slot: "Slot", task: Task, outcome: Outcome) -> None:
        """Look at a slot after a task, before it gets the next one."""

    def kill(self, task: Task) -> None:
        """End the worker that runs `task`."""
        for slot in self._slots:
            slot.kill(task)

    def shutdown(self) -> None:
        """End every pool, then the template."""
        for slot in self._slots:
            slot.close()
        self._launcher.stop()
        self._courier.close()

    def new_pool(self, slot: "Slot") -> Pool:
        """Make the pool of one slot, which hears of every process the pool starts."""
        return self.make_pool(WorkerContext(self._launcher, slot.started), self._setup)


class Slot:
    """One pool with one worker, replaced when it breaks."""

    def __init__(self, backend: PooledBackend) -> None:
        self._backend = backend
        self.device: str | None = None  # that its worker computes on, if it stays there
        self._pool: Pool | None = None
        self._retired: Pool | None = None
        self._distrusted = False  # the worker was ended before it began: its task may be given to another
        self._lock = threading.Lock()  # guards the two below
        self._task: Task | None = None
        self._process: WorkerProcess | None = None

    def call(self, task: Task, message: bytes) -> bytes:
        """Have the worker run one packed task.

        Raises
        ------
        WorkerDiedError
            The worker died; the next call gets a new one.
        """
        with self._lock:
            self._task = task
            task.pid = self._process.pid if self._process is not None else None
        try:
            return self._submit(message)
        except BrokenExecutor:
            process = self._process
            pid, exitcode = (process.pid, exit_code(process)) if process else (None, None)
            del process
            died = WorkerDiedError(pid, exitcode, task.name)
        finally:
            with self._lock:
                self._task = None
            if task.doomed:  # the signal may hit the worker only now, when it is idle
                self._discard()
        try:
            raise died  # here, without the pool's error: its frames hold the process and its pipes
        finally:
            del died  # no cycle

    def _submit(self, message: bytes) -> bytes:
        while True:
            if self._distrusted or (self._process is not None and self._process.exitcode):
                self._discard()  # the worker died while it was idle, and the pool may not have noticed
            future = None
            try:
                if self._pool is not None:
                    try:
                        future = self._pool.submit(run, message)
                    except BrokenExecutor:
                        self._discard()
                if future is None:
                    self._process = None
                    self._pool = self._backend.new_pool(self)
                    future = self._pool.submit(run, message)
                return future.result()
            except BrokenExecutor:
                begun = not self._distrusted
                self._discard()
                if begun:
                    raise
            except BaseException:
                self._discard()
                raise
            finally:
                del future  # the traceback of its exception holds this frame: no cycle

    def started(self, process: WorkerProcess) -> None:
        """Take note of a process the pool has started."""
        with self._lock:
            before, self._process = self._process, process
            doomed = self._task is not None and self._task.doomed
            if self._task is not None:
                self._task.pid = process.pid
        # A predecessor that was killed just after its answer may have died holding the result queue's lock;
        # the pool takes its end for a regular one, and the new worker would wait for that lock for ever.
        # It is too young to have begun a task, which goes to a new pool.
        self._distrusted = before is not None and bool(before.exitcode)
        if doomed or self._distrusted:
            end_process(process)

    def kill(self, task: Task) -> None:
        """End the worker if it runs `task`."""
        with self._lock:
            if self._task is task and self._process is not None:
                end_process(self._process)

    def retire(self, usage: Usage | None = None) -> None:
        """Give the next task a new worker; wait for this one's end only where device memory may come back."""
        if self._retired is not None:
            self._retired.shutdown(wait=True)
        self._retired, self._pool, self.device = self._pool, None, None
        if self._retired is not None:
            self._retired.shutdown(wait=usage is not None and usage.may_hold_device)

    def await_end(self, usage: Usage | None) -> None:
        """Wait for the end of the worker that ran a task, if it may hold device memory."""
        process = self._process
        if process is None or usage is None or not usage.may_hold_device:
            return
        if process.pid == usage.worker_pid:  # else the pool has seen its end, and started the next
            process.join()

    def close(self) -> None:
        """End the worker. Returns when it is gone."""
        if self._retired is not None:
            self._retired.shutdown(wait=True)
        self._discard()
        self._retired = self._process = None

    def _discard(self) -> None:
        """Drop a broken pool; when this returns, its processes have been reaped."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)
            self._distrusted = False
            if self._process is not None:
                self._process.join()  # a broken loky does not, and multiprocessing keeps what is not joined
