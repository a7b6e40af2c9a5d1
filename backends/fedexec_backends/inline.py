"""``inline``: the caller's own process, one thread a slot. The baseline that isolation is measured against.

No pickling, no limit, no protection: what a task leaks or breaks, it leaks or breaks here.
"""

import os
import threading
import time

from fedexec.errors import InitializerError, is_out_of_memory
from fedexec.interface import Backend, Outcome, Task, Usage
from fedexec.worker import preload

__all__ = ["InlineBackend"]


class InlineBackend(Backend):
    """Runs a task in the thread that brings it."""

    def start(self) -> None:
        """Import the preload."""
        preload(self.settings.preload)
        self._thread = threading.local()

    def run(self, task: Task) -> Outcome:
        """Call the function."""
        if failure := self._initialize():
            return Outcome(exception=failure)
        wall, cpu = time.perf_counter(), time.thread_time()
        outcome = Outcome()
        try:
            outcome.value = task.fn(*task.args, **task.kwargs)
        except BaseException as exc:
            # Without our own frame, which would keep the arguments alive as long as the exception.
            outcome.exception = exc.with_traceback(exc.__traceback__ and exc.__traceback__.tb_next)
            outcome.out_of_memory = is_out_of_memory(exc)
        outcome.usage = Usage(
            worker_pid=os.getpid(),
            wall_seconds=time.perf_counter() - wall,
            cpu_seconds=time.thread_time() - cpu,
        )
        try:
            return outcome
        finally:
            del outcome, task  # the traceback's frames refer to this one: no cycle

    def _initialize(self) -> InitializerError | None:
        """Call the initializer once a thread, as ThreadPoolExecutor does."""
        if self.hooks.initializer is None or getattr(self._thread, "ready", False):
            return None
        try:
            self.hooks.initializer(*self.hooks.initargs)
        except BaseException as exc:
            failure = InitializerError(os.getpid(), repr(exc))
            failure.__cause__ = exc
            return failure
        self._thread.ready = True
        return None
