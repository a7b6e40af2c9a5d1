"""``inline``: the caller's own process, one thread a slot. The baseline that isolation is measured against.

No pickling, no limit, no protection: what a task leaks or breaks, it leaks or breaks here.
"""

import os
import threading
import time
from collections.abc import Callable

from fedexec.backend import (
    Backend,
    Hooks,
    InitializerError,
    Outcome,
    Settings,
    Task,
    Usage,
    device_environment,
    is_out_of_memory,
    preload,
)

__all__ = ["InlineBackend"]


class InlineBackend(Backend):
    """Runs a task in the thread that brings it."""

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        super().__init__(settings, hooks)
        self._before: dict[str, str | None] = {}  # the environment's variables that we have changed

    def start(self) -> None:
        """Have this process compute on the device that was chosen, until the shutdown; import the preload."""
        variables = device_environment(self.settings)
        self._before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
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

    def rehearse(self, call: Callable[[], object], name: str) -> str | None:
        """Do nothing: what a task leaves in memory, all later ones find anyway."""
        return None

    def shutdown(self) -> None:
        """Give the environment back."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

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
