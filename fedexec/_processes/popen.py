"""Three kinds of multiprocessing's ``Popen``: each starts one worker and reports the worker's end.

They rely on ``Popen._launch``, which multiprocessing does not document.
"""

import io
import os
import signal
import threading
from multiprocessing import popen_forkserver, popen_spawn_posix, reduction, spawn, util
from multiprocessing.connection import wait
from multiprocessing.context import set_spawning_popen
from multiprocessing.forkserver import read_signed
from multiprocessing.process import BaseProcess
from typing import Any

from fedexec._processes.forker import inherited_fd
from fedexec._processes.forkserver_client import Template, end_if_stopped
from fedexec._processes.leaving import end_group, has_ended
from fedexec._processes.preparation_data import preparation, tracker_fd
from fedexec._processes.stopped_processes import await_reader
from fedexec._system import forks

__all__ = ["UNKNOWN_EXITCODE", "ForkedPopen", "ServedPopen", "SpawnedPopen", "WorkerPopen"]

_util: Any = util  # gives access to underscored names, which type checkers do not know
UNKNOWN_EXITCODE = 255  # as in multiprocessing: exit code of a worker whose template died first


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        forks.let_go(fd)
        os.close(fd)


def _lifeline() -> tuple[int, int]:
    """Make a pipe whose reading end ends with this process, even if this process has forked."""
    with forks.no_fork():
        reading, writing = os.pipe()
        return reading, forks.hold(writing)


def _packed(process: BaseProcess, popen: "ForkedPopen | SpawnedPopen") -> bytes:
    """Pickle the process object and its preparation, without the caller's ``__main__``."""
    buffer = io.BytesIO()
    set_spawning_popen(popen)
    try:
        reduction.dump(preparation(process.name), buffer)
        reduction.dump(process, buffer)
    finally:
        set_spawning_popen(None)
    return buffer.getvalue()


class _InheritedFd:
    def __init__(self, index: int) -> None:
        self.index = index

    def detach(self) -> int:
        return inherited_fd(self.index)


class ForkedPopen(popen_forkserver.Popen):
    """Starts a worker by a fork of the executor's template, not of multiprocessing's global forkserver.

    Parameters
    ----------
    process : BaseProcess
    template : Template
    """

    DupFd = _InheritedFd  # type: ignore[assignment]
    _fds: list[int]

    def __init__(self, process: BaseProcess, template: Template) -> None:
        self._template = template
        self._reaping = threading.Lock()
        super().__init__(process)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code that the template reports; thread-safe, unlike the standard method.

        Parameters
        ----------
        flag : int
            ``os.WNOHANG``: do not wait. 0: wait until the worker has ended.

        Returns
        -------
        int or None
            Negative: a signal. None: the worker still runs.
        """
        if self.returncode is None and wait([self.sentinel], 0 if flag == os.WNOHANG else None):
            with self._reaping:
                if self.returncode is None:
                    end_if_stopped(self._template_pid, self._status_fd)
                    try:
                        self.returncode = read_signed(self._status_fd)
                    except (OSError, EOFError):  # The template died first, so the code is unknown.
                        end_group(self.pid)
                        self.returncode = UNKNOWN_EXITCODE
        return self.returncode

    def _launch(self, process: BaseProcess) -> None:
        data = _packed(process, self)
        try:
            data_w = self._fork()
        except EOFError:  # The template died during the request; the second request starts a new one.
            data_w = self._fork()
        _write(data_w, data, self.pid)

    def _fork(self) -> int:
        """Request a worker from the template; return the pipe's end that the process object is written to."""
        status_r, status_w = os.pipe()
        data_r, data_w = _lifeline()
        # The end of the data pipe tells the worker that this process has ended, so keep the writing end open.
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
            # The status pipe also ends with the template; only a pidfd tells that the worker has ended.
            self.sentinel = os.pidfd_open(self.pid)
            fds.append(self.sentinel)
        except (AttributeError, OSError):
            pass  # The system lacks this call, or the worker has ended already.
        return data_w


class ServedPopen(ForkedPopen):
    """Starts a worker whose work the template knows: only the worker's connection is sent along."""

    def _launch(self, process: BaseProcess) -> None:
        (connection,) = process._args  # type: ignore[attr-defined]
        self._fds.append(connection.fileno())
        try:
            self._fork()
        except EOFError:  # The template died during the request; the second request starts a new one.
            self._fork()


class SpawnedPopen(popen_spawn_posix.Popen):
    """Starts a worker as a fresh interpreter.

    Parameters
    ----------
    process : BaseProcess
    """

    _fds: list[int]

    def __init__(self, process: BaseProcess) -> None:
        self._reaping = threading.Lock()
        super().__init__(process)

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Return the exit code; this method is thread-safe.

        Parameters
        ----------
        flag : int
            ``os.WNOHANG``: do not wait. 0: wait until the worker has ended.

        Returns
        -------
        int or None
            Negative: a signal. None: the worker still runs.
        """
        while True:
            ended = self.returncode is None and has_ended(self.pid, wait=flag != os.WNOHANG)
            with self._reaping:
                if self.returncode is None and has_ended(self.pid):
                    end_group(self.pid)  # ends what the worker's task left running
                code = super().poll(os.WNOHANG)
            if code is not None or not ended or flag == os.WNOHANG:
                return code

    def _launch(self, process: BaseProcess) -> None:
        tracker = tracker_fd()
        self._fds.append(tracker)
        data = _packed(process, self)
        status_r, status_w = os.pipe()
        data_r, data_w = _lifeline()
        self.sentinel = status_r
        self.finalizer = util.Finalize(self, _close_all, ([status_r, data_w],))
        # Ctrl+C is for this process alone. Block it until the worker leads a process group of its own.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            command = spawn.get_command_line(tracker_fd=tracker, pipe_handle=data_r)
            self.pid = _util.spawnv_passfds(spawn.get_executable(), command, [*self._fds, data_r, status_w])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.close(data_r)
            os.close(status_w)
        _write(data_w, data, self.pid)


WorkerPopen = ForkedPopen | SpawnedPopen


def _write(fd: int, data: bytes, pid: int) -> None:
    """Send all of `data` to a worker; if the worker dies meanwhile, its sentinel reports that."""
    try:
        with await_reader(pid, len(data)), open(fd, "wb", closefd=False) as file:
            file.write(data)
    except BrokenPipeError:
        pass
