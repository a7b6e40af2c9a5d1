"""How worker processes start: a :mod:`multiprocessing` context that ``process``, ``pool`` and ``loky`` share.

It differs from the standard contexts in two ways: the caller's ``__main__`` is not run again in the worker
(tasks travel by value, so nobody needs it, and a heavy one made 30 small tasks take 183 s instead of 15), and
"forkserver" forks from a :class:`~fedexec_backends._template.Template` of this executor's own.

It builds on names of multiprocessing that its documentation does not mention: ``Process._Popen`` and
``Popen._launch``, the same in CPython 3.11 to 3.14.
"""

import functools
import io
import logging
import multiprocessing.context
import multiprocessing.queues
import multiprocessing.synchronize  # these two so that they are in the template: workers of pools need them
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import popen_forkserver, popen_spawn_posix, reduction, resource_tracker, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import set_spawning_popen
from multiprocessing.forkserver import read_signed
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

if sys.platform == "linux":
    import fcntl

from fedexec import forks
from fedexec.errors import BackendUnavailableError, PreloadError
from fedexec.interface import Hooks
from fedexec.learning import Learner, Lesson
from fedexec.pickling import dumps
from fedexec.settings import Settings
from fedexec.worker import environment, leave
from fedexec_backends._forker import Service, inherited_fd
from fedexec_backends._leaving import has_ended
from fedexec_backends._stopped import await_reader
from fedexec_backends._template import (
    Template,
    UnfitTemplateError,
    end_if_stopped,
    preparation,
    tracker_fd,
)

__all__ = ["Launcher", "WorkerContext", "WorkerProcess", "end_process", "exit_code", "start_tracker_apart"]

log = logging.getLogger("fedexec")
_util: Any = util  # its names that type checkers do not know

_NO_WAITID = 'start_method="forkserver" needs os.waitid, new in Python 3.13 on macOS; "spawn" does without'
UNKNOWN_EXITCODE = 255  # as in multiprocessing, of a worker whose template died before it


class Launcher:
    """Starts the worker processes of one executor.

    Parameters
    ----------
    settings : Settings
        Start method, preload.
    hooks : Hooks
        The warm-up.
    backend : str
        The backend's module, whose functions the workers run.
    service : Service, optional
        What every process does, where all do the same; its only argument is then a connection.
    """

    def __init__(
        self, settings: Settings, hooks: Hooks, backend: str, service: Service | None = None
    ) -> None:
        _open_standard_streams()
        _try_signals()
        start_tracker_apart(resource_tracker)
        self.template: Template | None = None
        self._learns = settings.learn
        self._insists = settings.sources.get("start_method", "default") != "default"
        if settings.start_method == "forkserver":
            if not hasattr(os, "waitid"):
                raise BackendUnavailableError(settings.backend, _NO_WAITID)
            self.template = Template(
                settings.preload,
                hooks.warmup,
                settings.preload_timeout,
                backend,
                service,
                environment(settings),
            )

    def start(self) -> None:
        """Import the preload, where one process does it for all.

        A template that is unfit to be forked is given up, with one warning: workers are then fresh
        interpreters that import the preload themselves.

        Raises
        ------
        PreloadError
            A module cannot be imported; or it makes the template unfit, and the user insists on forks, or
            fresh interpreters cannot be started here.
        """
        if self.template is None:
            return
        try:
            self.template.start()
        except UnfitTemplateError as exc:
            if self._insists:
                exc.add_note('start_method="forkserver" was asked for; with "spawn" workers start afresh.')
                raise
            if not _can_spawn():
                exc.add_note(
                    f"Nor can fresh interpreters be started: {spawn.get_executable()!r} cannot be executed."
                )
                raise
            log.warning(
                "%s. Until then each worker is a fresh interpreter, which takes longer to start "
                '(start_method="spawn" does the same without this warning).',
                str(exc),
            )
            self.template = None

    def learner(self, renew: Callable[[], object] = lambda: None) -> Learner | None:
        """Return what decides what workers are born with; None where they are not forked, or learn nothing.

        Parameters
        ----------
        renew : callable
            As for :class:`fedexec.learning.Learner`.
        """
        return Learner(self._learn, renew) if self._learns and self.template is not None else None

    def _learn(self, modules: tuple[str, ...]) -> Lesson:
        return Lesson() if self.template is None else self.template.learn(modules)

    def rehearse(self, call: Callable[[], object], name: str, renew: Callable[[], object]) -> str | None:
        """Have workers be born with what a call leaves in memory; ``renew`` those that wait without it."""
        if self.template is None:
            return "it starts its workers as fresh interpreters, which inherit nothing"
        reason = self.template.rehearse(dumps(call), name)
        if reason is None:
            renew()
        return reason

    def stop(self) -> None:
        """End the template, if there is one."""
        if self.template is not None:
            self.template.stop()

    def launch(self, process: "WorkerProcess") -> "_Popen":
        """Start one process."""
        if self.template is not None:
            try:
                popen = _ForkedPopen if self.template.service is None else _ServedPopen
                return popen(process, self.template)
            except (EOFError, OSError, PreloadError) as exc:
                # Raised in a pool's management thread, this would end the thread and hang its futures. A
                # spawned worker imports the preload by itself, and its task hears of it if that fails.
                log.warning("the template cannot be replaced, a worker is spawned instead: %s", str(exc))
        return _SpawnedPopen(process)


class WorkerContext(multiprocessing.context.SpawnContext):
    """What a pool takes for its ``mp_context``.

    Parameters
    ----------
    launcher : Launcher
    """

    worker_class: "type[WorkerProcess]"

    def __init__(self, launcher: Launcher) -> None:
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
    _launcher: Launcher | None = None
    _stays_here: tuple[str, ...] = ("_launcher", "_popen")  # attributes that the worker does not get

    def _Popen(self, process: "WorkerProcess") -> "_Popen":  # noqa: N802
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


def _can_spawn() -> bool:
    """Return whether a fresh interpreter can be started."""
    return shutil.which(os.fsdecode(spawn.get_executable() or "")) is not None


def _open_standard_streams() -> None:
    """Have descriptors 0, 1 and 2 lead somewhere: a daemon may have closed them.

    Otherwise pipes of ours get these numbers, and whoever reads, writes or closes a standard stream, in this
    process or in a worker, hits one of them.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # It gets the lowest number that is free.
            os.set_inheritable(opened, True)


@functools.cache
def _try_signals() -> None:
    """Say, once, where workers must do without a signal of the kernel's at the end of this process."""
    reading, writing = os.pipe()
    try:
        if sys.platform == "linux":
            fcntl.fcntl(reading, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(reading, fcntl.F_SETSIG, 0)
    except OSError as exc:
        log.warning(
            "this system refuses F_SETSIG (%s): a thread in each worker watches for the end of this process, "
            "which a task that keeps Python's global lock may outlive",
            exc,
        )
    finally:
        os.close(reading)
        os.close(writing)


def end_process(process: BaseProcess, number: int = signal.SIGKILL) -> None:
    """Send a signal to a worker and what it started, if it has not ended; by default one that kills."""
    pid = process.pid
    if pid is not None and process.exitcode is None and not _kill_group(pid, number):
        process.kill()  # too young to lead a group


def exit_code(process: BaseProcess) -> int | None:
    """Return how a worker ended: as ``exitcode``, but None where nobody knows."""
    return None if process.exitcode == UNKNOWN_EXITCODE else process.exitcode


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        forks.let_go(fd)
        os.close(fd)


def _lifeline() -> tuple[int, int]:
    """Make a pipe whose reading end tells a worker that this process is gone, whatever it has forked."""
    with forks.no_fork():
        reading, writing = os.pipe()
        return reading, forks.hold(writing)


def _kill_group(pid: int, number: int = signal.SIGKILL) -> bool:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return False
    return True


def _packed(process: WorkerProcess, popen: Any) -> bytes:
    """Pickle what the worker needs, without the caller's ``__main__``."""
    buffer = io.BytesIO()
    set_spawning_popen(popen)
    try:
        reduction.dump(preparation(process.name), buffer)
        reduction.dump(process, buffer)
    finally:
        set_spawning_popen(None)
    return buffer.getvalue()


def start_tracker_apart(module: ModuleType) -> None:
    """Start a resource tracker that leads a process group of its own, unless it runs already.

    It removes the names of semaphores when the caller is gone. Left in the caller's group it is ended by what
    ends the whole group (``kill -9 -PGID``, a closed terminal), and the names stay for ever.

    Parameters
    ----------
    module : module
        :mod:`multiprocessing.resource_tracker`, or loky's.
    """
    tracker: Any = module._resource_tracker
    with forks.no_fork(), tracker._lock:
        if tracker._fd is not None:
            return
        reading, writing = os.pipe()
        command = [os.fsdecode(spawn.get_executable()), *_util._args_from_interpreter_flags()]
        command += ["-c", f"from {module.__name__} import main; main({reading})"]
        os.set_inheritable(reading, True)
        # Blocked until it ignores them and says so to the kernel, both of which its main() does first.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            # Its number stays unknown to multiprocessing, which newer releases of CPython have wait at exit
            # for the end of a tracker that they know: it lives as long as any process that a task has left.
            os.posix_spawn(command[0], command, os.environ, setpgroup=0)
        except BaseException:
            os.close(writing)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(reading)
        tracker._fd = writing


class _InheritedFd:
    def __init__(self, index: int) -> None:
        self.index = index

    def detach(self) -> int:
        return inherited_fd(self.index)


class _ForkedPopen(popen_forkserver.Popen):
    """Forked from our own template instead of multiprocessing's global forkserver."""

    DupFd = _InheritedFd  # type: ignore[assignment]
    _fds: list[int]

    def __init__(self, process: WorkerProcess, template: Template) -> None:
        self._template = template
        self._reaping = threading.Lock()
        super().__init__(process)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code the template reports; from any thread, unlike the standard one."""
        if self.returncode is None and wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            with self._reaping:
                if self.returncode is None:
                    end_if_stopped(self._template_pid, self._status_fd)
                    try:
                        self.returncode = read_signed(self._status_fd)
                    except (OSError, EOFError):  # the template died before the worker: nobody can tell
                        _kill_group(self.pid)
                        self.returncode = UNKNOWN_EXITCODE
        return self.returncode

    def _launch(self, process: WorkerProcess) -> None:
        data = _packed(process, self)
        try:
            data_w = self._fork()
        except EOFError:  # the template died under the request: a new one answers
            data_w = self._fork()
        _write(data_w, data, self.pid)

    def _fork(self) -> int:
        """Ask the template for a worker; return the end of the pipe it reads its process object from."""
        status_r, status_w = os.pipe()
        data_r, data_w = _lifeline()
        # The worker sees the end of this process as the end of the data pipe: we keep its writing end open.
        fds = [status_r, data_w]
        self.finalizer = util.Finalize(self, _close_all, (fds,))
        try:
            self._template_pid = self._template.fork([data_r, status_w, tracker_fd(), *self._fds])
        finally:
            os.close(data_r)
            os.close(status_w)
        end_if_stopped(self._template_pid, status_r)
        try:
            self.pid = read_signed(status_r)
        except EOFError:
            self.finalizer()
            raise
        self._status_fd = self.sentinel = status_r
        try:
            # The end of the worker itself: the status pipe also ends with the template, which is no death.
            self.sentinel = os.pidfd_open(self.pid)
            fds.append(self.sentinel)
        except (AttributeError, OSError):
            pass  # no such call here, or the worker has ended already
        return data_w


class _ServedPopen(_ForkedPopen):
    """Forked from a template that knows what its workers do: the connection goes along, and nothing else."""

    def _launch(self, process: WorkerProcess) -> None:
        (connection,) = process._args  # type: ignore[attr-defined]
        self._fds.append(connection.fileno())
        try:
            self._fork()
        except EOFError:  # the template died under the request: a new one answers
            self._fork()


class _SpawnedPopen(popen_spawn_posix.Popen):
    """A fresh interpreter."""

    _fds: list[int]

    def __init__(self, process: WorkerProcess) -> None:
        self._reaping = threading.Lock()
        super().__init__(process)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code; from any thread."""
        while True:
            ended = self.returncode is None and has_ended(self.pid, wait=flag != os.WNOHANG)
            with self._reaping:
                if self.returncode is None and has_ended(self.pid):
                    _kill_group(self.pid)  # what its task left running
                code = super().poll(os.WNOHANG)
            if code is not None or not ended or flag == os.WNOHANG:
                return code

    def _launch(self, process: WorkerProcess) -> None:
        tracker = tracker_fd()
        self._fds.append(tracker)
        data = _packed(process, self)
        status_r, status_w = os.pipe()
        data_r, data_w = _lifeline()
        self.sentinel = status_r
        self.finalizer = util.Finalize(self, _close_all, ([status_r, data_w],))
        # Blocked until the worker leads a group of its own: Ctrl+C is this process's business.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            command = spawn.get_command_line(tracker_fd=tracker, pipe_handle=data_r)
            self.pid = _util.spawnv_passfds(spawn.get_executable(), command, [*self._fds, data_r, status_w])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(data_r)
            os.close(status_w)
        _write(data_w, data, self.pid)


_Popen = _ForkedPopen | _SpawnedPopen


def _write(fd: int, data: bytes, pid: int) -> None:
    """Send all of `data` to a worker; if it dies meanwhile, whoever waits for it will see that."""
    try:
        with await_reader(pid, len(data)), open(fd, "wb", closefd=False) as file:
            file.write(data)
    except BrokenPipeError:
        pass
