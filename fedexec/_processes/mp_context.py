"""A :mod:`multiprocessing` context for all isolating backends: a launcher starts its processes.

It differs from the standard contexts in two ways. The worker does not run the caller's ``__main__`` again:
tasks travel by value, so workers do not need it, and a heavy ``__main__`` made 30 small tasks take 183 s
instead of 15 s. And "forkserver" forks from the executor's own
:class:`~fedexec._processes.forkserver_client.Template`.

The context relies on ``Process._Popen``, which multiprocessing does not document, and which is the same in
CPython 3.11 to 3.14.
"""

import multiprocessing.context
import multiprocessing.queues
import multiprocessing.synchronize  # with queues: the template has both, because workers of pools need them
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from fedexec._processes.leaving import end_group
from fedexec._processes.popen import UNKNOWN_EXITCODE, WorkerPopen
from fedexec._worker.ending import leave

__all__ = ["WorkerContext", "WorkerProcess", "end_process", "exit_code"]


class _Launcher(Protocol):
    """Starts processes; see :class:`fedexec._processes.launcher.Launcher`."""

    def launch(self, process: "WorkerProcess", /) -> WorkerPopen: ...


class WorkerContext(multiprocessing.context.SpawnContext):
    """The context that a pool accepts as its ``mp_context``.

    Parameters
    ----------
    launcher : Launcher
        Starts the processes.
    """

    worker_class: "type[WorkerProcess]"

    def __init__(self, launcher: _Launcher) -> None:
        super().__init__()
        self._launcher = launcher

    def Process(  # type: ignore[override]  # noqa: N802
        self, group: None = None, target: Callable[..., object] | None = None, name: str | None = None,
        args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
    ) -> "WorkerProcess":  # fmt: skip
        """Make a process that the launcher starts.

        Parameters
        ----------
        group : None
            Must be None, as in multiprocessing.
        target : callable, optional
        name : str, optional
        args : tuple
        kwargs : dict, optional
            As for :class:`multiprocessing.Process`.

        Returns
        -------
        WorkerProcess
        """
        process = self.worker_class(target=target, name=name, args=args, kwargs=kwargs or {})
        process._launcher = self._launcher
        return process


class WorkerProcess(BaseProcess):
    """A process that a launcher starts."""

    _start_method = None  # The worker's own children use the same start method as the caller's children.
    _launcher: _Launcher | None = None
    _stays_here: tuple[str, ...] = ("_launcher", "_popen")  # attributes that are not sent to the worker

    def _Popen(self, process: "WorkerProcess") -> WorkerPopen:  # noqa: N802
        assert self._launcher is not None
        return self._launcher.launch(process)

    def start(self) -> None:
        """Start the process, also from a daemonic process, and do not list it as a child of multiprocessing.

        multiprocessing forbids children of daemonic processes because they could outlive the daemon; a worker
        of fedexec always ends with its caller. multiprocessing joins listed children at exit, before
        executors that were left open are shut down, and so does code that joins ``active_children()``: both
        would wait for ever for a worker that waits for a task.
        """
        self._popen = self._Popen(self)
        self._sentinel = self._popen.sentinel
        del self._target, self._args, self._kwargs  # type: ignore[attr-defined]

    def run(self) -> None:
        """Do the worker's work, then end the process."""
        super().run()
        leave()

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in self._stays_here} | {"_popen": None}
        # The caller may be daemonic; the worker may start processes all the same, because they end with it.
        state["_config"] = {k: v for k, v in state["_config"].items() if k != "daemon"}
        return state


WorkerContext.worker_class = WorkerProcess


def end_process(process: BaseProcess, number: int = signal.SIGKILL) -> None:
    """Send a signal to a worker and the processes that it started, if the worker has not ended.

    Parameters
    ----------
    process : BaseProcess
        The worker.
    number : int
        The signal; SIGKILL by default.
    """
    pid = process.pid
    if pid is not None and process.exitcode is None and not end_group(pid, number):
        process.kill()  # The worker is too young to lead a process group.


def exit_code(process: BaseProcess) -> int | None:
    """Return a worker's exit code as ``exitcode`` does, but None if it is unknown.

    Parameters
    ----------
    process : BaseProcess

    Returns
    -------
    int or None
        Negative: the signal that ended the worker. None: it runs still, or its template died first.
    """
    return None if process.exitcode == UNKNOWN_EXITCODE else process.exitcode
