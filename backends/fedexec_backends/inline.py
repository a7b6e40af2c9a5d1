"""``inline``: tasks run in the caller's own process, one thread per slot; the baseline without isolation.

Nothing is pickled or limited, and nothing protects the caller: a task's leaks and crashes are the caller's.
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
    """Runs each task in the thread that submits it to the backend.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
    """

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        super().__init__(settings, hooks)
        # environment variables that this backend has changed -> earlier values
        self._before: dict[str, str | None] = {}

    def start(self) -> None:
        """Set the environment variables of the chosen device until the shutdown, and import the preload.

        Raises
        ------
        PreloadError
            A module cannot be imported.
        """
        variables = device_environment(self.settings)
        self._before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        preload(self.settings.preload)
        self._thread = threading.local()

    def run(self, task: Task) -> Outcome:
        """Call the function in this thread.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Outcome
        """
        if failure := self._initialize():
            return Outcome(exception=failure)
        wall, cpu = time.perf_counter(), time.thread_time()
        outcome = Outcome()
        try:
            outcome.value = task.fn(*task.args, **task.kwargs)
        except BaseException as exc:
            # Leave out this method's own frame: it would keep the arguments alive as long as the exception.
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
            # The traceback refers to this frame, so local names would form a reference cycle.
            del outcome, task

    def rehearse(self, call: Callable[[], object], name: str) -> str | None:
        """Do nothing: later tasks find anyway what an earlier task leaves in this process.

        Parameters
        ----------
        call : callable
        name : str

        Returns
        -------
        None
            There is never a reason to refuse.
        """
        return None

    def shutdown(self) -> None:
        """Restore the environment variables."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _initialize(self) -> InitializerError | None:
        """Call the initializer once per thread, as ThreadPoolExecutor does."""
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
