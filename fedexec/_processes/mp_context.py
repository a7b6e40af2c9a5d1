"""A :mod:`multiprocessing` context whose processes start our way; every isolating backend uses it.

It differs from the standard contexts in two ways: the caller's ``__main__`` is not run again in the worker
(tasks travel by value, so nobody needs it, and a heavy one made 30 small tasks take 183 s instead of 15), and
"forkserver" forks from a :class:`~fedexec._processes.forkserver_client.Template` of this executor's own.

It builds on ``Process._Popen``, which the documentation of multiprocessing does not mention; it is the same
in CPython 3.11 to 3.14.
"""

import multiprocessing.context
import multiprocessing.queues
import multiprocessing.synchronize  # these two so that they are in the template: workers of pools need them
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from fedexec._processes.popen import UNKNOWN_EXITCODE, WorkerPopen, kill_group
from fedexec._worker.ending import leave

__all__ = ["WorkerContext", "WorkerProcess", "end_process", "exit_code"]


class _Launcher(Protocol):
    """Starts processes; see :class:`fedexec._processes.launcher.Launcher`."""

    def launch(self, process: "WorkerProcess", /) -> WorkerPopen: ...


class WorkerContext(multiprocessing.context.SpawnContext):
    """What a pool takes for its ``mp_context``.

    Parameters
    ----------
    launcher : Launcher
    """

    worker_class: "type[WorkerProcess]"

    def __init__(self, launcher: _Launcher) -> None:
        super().__init__()
        self._launcher = launcher

    def Process(  # type: ignore[override]  # noqa: N802
        self, group: None = None, target: Callable[..., object] | None = None, name: str | None = None,
        args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
    ) -> "WorkerProcess":  # fmt: skip
        """Make a process that starts our way."""
        process = self.worker_class(target=target, name=name, args=args, kwargs=kwargs or {})
        process._launcher = self._launcher
        return process


class WorkerProcess(BaseProcess):
    """A process of this context."""

    _start_method = None  # The worker's own children start as the caller's do.
    _launcher: _Launcher | None = None
    _stays_here: tuple[str, ...] = ("_launcher", "_popen")  # attributes that the worker does not get

    def _Popen(self, process: "WorkerProcess") -> WorkerPopen:  # noqa: N802
        assert self._launcher is not None
        return self._launcher.launch(process)

    def start(self) -> None:
        """Start it, also from a daemonic process, and apart from the children that multiprocessing lists.

        A daemonic process may start none, lest they outlive it: ours end with their caller, however it ends.
        Those that are listed are joined at exit, before executors that were left open are shut down, and by
        whoever waits for ``active_children()``: a worker that waits for a task would never be done.
        """
        self._popen = self._Popen(self)
        self._sentinel = self._popen.sentinel
        del self._target, self._args, self._kwargs  # type: ignore[attr-defined]

    def run(self) -> None:
        """Do a worker's work, then end."""
        super().run()
        leave()

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in self._stays_here} | {"_popen": None}
        # A worker may start processes although its caller, a daemonic one, may not: they end with the worker.
        state["_config"] = {k: v for k, v in state["_config"].items() if k != "daemon"}
        return state


WorkerContext.worker_class = WorkerProcess


def end_process(process: BaseProcess, number: int = signal.SIGKILL) -> None:
    """Send a signal to a worker and what it started, if it has not ended; by default one that kills."""
    pid = process.pid
    if pid is not None and process.exitcode is None and not kill_group(pid, number):
        process.kill()  # too young to lead a group


def exit_code(process: BaseProcess) -> int | None:
    """Return how a worker ended: as ``exitcode``, but None where nobody knows."""
    return None if process.exitcode == UNKNOWN_EXITCODE else process.exitcode
