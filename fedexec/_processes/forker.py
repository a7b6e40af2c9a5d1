"""Forks workers in the template, reaps them, and tells the caller how each worker ended."""

import _signal  # type: ignore[import-not-found]  # `signal`'s wrappers would copy 50 memory pages per worker
import atexit
import contextlib
import gc
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from multiprocessing import process, resource_tracker, spawn, util
from multiprocessing.connection import Connection
from multiprocessing.forkserver import MAXFDS_TO_SEND, write_signed
from typing import Any, NoReturn, Protocol

from fedexec._processes import fork_fitness, huge_pages, leaving
from fedexec._processes.leaving import (
    ToDoAtExit,
    end_group,
    leave_out_inherited,
)
from fedexec._processes.template_successor import Trial
from fedexec._worker.ending import leave
from fedexec._worker.threads import keep_torch_threads, limit_loaded

__all__ = ["Forker", "Service", "inherited_fd", "settle_memory"]

_util: Any = util  # gives access to underscored names, which type checkers do not know
_process: Any = process
_tracker: Any = resource_tracker._resource_tracker
_SIGCHLD, _SIGHUP, _SIGINT = int(signal.SIGCHLD), int(signal.SIGHUP), int(signal.SIGINT)
_HAS_ENDED = -2  # stands in place of a pid


class Service(Protocol):
    """The work of workers that need no process object: the template knows the work before it forks."""

    def prepare(self) -> None:
        """Do once, in the template, what each worker would otherwise have to do."""

    def serve(self, connection: Connection) -> None:
        """Do a worker's work; the worker ends when this method returns.

        Parameters
        ----------
        connection : Connection
            The worker's end of the pipe to the caller.
        """


_inherited_fds: list[int] = []


def inherited_fd(index: int) -> int:
    """Return, in a worker, a descriptor that the process object refers to by its index.

    Parameters
    ----------
    index : int
        Position among the descriptors that the caller sent along.

    Returns
    -------
    int
        The descriptor's number in this worker.
    """
    return _inherited_fds[index]


def settle_memory() -> None:
    """Arrange the memory that workers share with the template, so that they copy and free little of it."""
    gc.collect()
    # The garbage collector of a worker must not write to these objects, or their pages are copied.
    gc.freeze()
    huge_pages.collapse()
    huge_pages.make_room()


def _ignore_hangup(signum: int, frame: object) -> None:
    """Survive the SIGHUP of a stopped group whose caller is gone: the workers must be ended first."""


class Forker:
    """Forks workers, reaps them, and ends all of them when the caller is gone.

    It uses one thread only, because a fork copies no other thread.

    Parameters
    ----------
    control : socket
        Connection to the caller, which sends requests and closes it in the end.
    service : Service or None
        What every worker does; None if each worker reads a process object.
    left_to_do : ToDoAtExit
        What imports have left to be done when the template exits.
    threads : dict of str to str
        Environment variable -> number of threads of workers; empty if workers use one thread.
    """

    def __init__(
        self, control: socket.socket, service: Service | None, left_to_do: ToDoAtExit, threads: dict[str, str]
    ) -> None:
        self._control = control
        self._service = service
        self._left_to_do = left_to_do
        self._threads = threads
        self._status_fds: dict[int, int] = {}  # pid -> pipe on which the caller waits for the exit code
        self._trial: Trial | None = None  # set while a child tries to import or rehearse
        self._lesson_fd = -1  # pipe on which the caller waits for the result of that trial
        self._successor = -1  # pid of the process that has replaced this one as the template
        self._spare_tracker_fd = os.dup(_tracker._fd)  # of the pipe to the caller's resource tracker
        self._selector = selectors.DefaultSelector()
        self._wakeup_r, self._wakeup_w = os.pipe()
        os.set_blocking(self._wakeup_r, False)
        os.set_blocking(self._wakeup_w, False)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        # The caller or an import may have blocked SIGCHLD; this process would not notice the end of a worker.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        signal.set_wakeup_fd(self._wakeup_w)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, _ignore_hangup)

    def run(self) -> NoReturn:
        """Serve the caller until it hangs up; if this process has a successor, until the successor ends."""
        self._serve()
        self._left_to_do.take_back()
        leave()

    def _serve(self) -> None:
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._wakeup_r, selectors.EVENT_READ)
        while True:
            left = None if self._trial is None else max(0.0, self._trial.deadline - time.monotonic())
            trying = -1 if self._trial is None else self._trial.pid
            ready = {key.fileobj for key, _ in self._selector.select(left)}
            if self._wakeup_r in ready:
                os.read(self._wakeup_r, 65536)
                self._end_stopped()
                self._reap()
                if self._successor == _HAS_ENDED:
                    return
            if self._trial is not None and self._trial.pid == trying:
                self._check_trial(self._trial, has_spoken=self._trial.fd in ready)
            if self._control in ready and self._successor < 0 and not self._answer():
                break
        if self._trial is not None:
            self._trial.end()
        for pid in self._status_fds:
            end_group(pid)
        signal.set_wakeup_fd(-1)

    def _answer(self) -> bool:
        try:
            message, fds, _, _ = socket.recv_fds(self._control, 1, MAXFDS_TO_SEND)
        except OSError:
            return False
        if message == b"f":
            self._fork(*fds)
        elif message == b"l":
            self._learn(*fds)
        return bool(message)

    def _fork(self, data_fd: int, status_fd: int, tracker_fd: int, *inherited: int) -> None:
        pid = fork_fitness.fork()
        if pid == 0:
            foreign = [status_fd, *self._status_fds.values()]
            self._become_worker(data_fd, foreign, tracker_fd, list(inherited))
        try:
            os.setpgid(pid, pid)  # The worker does the same: whichever process runs first creates the group.
        except OSError:
            pass
        self._report(status_fd, pid)
        self._status_fds[pid] = status_fd
        for fd in (data_fd, tracker_fd, *inherited):
            os.close(fd)

    def _end_stopped(self) -> None:
        """Kill the successor or the child on trial if it is stopped, because it cannot answer."""
        for pid in (self._successor, -1 if self._trial is None else self._trial.pid):
            with contextlib.suppress(ChildProcessError):
                if pid > 0 and os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None:
                    os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            # Report the exit code before the process is reaped: a caller that sees the process gone can then
            # rely on the report.
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            # ends what a task left running; the pid is still taken, because the worker is not reaped yet
            end_group(pid)
            status_fd = self._status_fds.pop(pid, None)
            if status_fd is not None:
                killed = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                self._report(status_fd, -ended.si_status if killed else ended.si_status)
                os.close(status_fd)
            _, status = os.waitpid(pid, 0)
            if pid == self._successor:
                self._end_after_successor(status)
            elif self._trial is not None and pid == self._trial.pid:
                self._try_again(self._trial, status)

    # ------------------------------------------------------------ learning

    def _learn(self, names_fd: int, lesson_fd: int) -> None:
        """Let a child import modules, or rehearse; a child that may be forked becomes the next template."""
        with os.fdopen(names_fd, "rb") as file:
            request = json.loads(file.readline())
            rehearsal = (request["rehearsal"], file.read()) if "rehearsal" in request else None
        if self._trial is not None:  # The caller of the earlier trial has stopped waiting for its result.
            self._give_up(self._trial)
        self._lesson_fd = lesson_fd
        self._set_trial(Trial(request["modules"], self, request["seconds"], rehearsal, request.get("path")))

    def _give_up(self, trial: Trial) -> None:
        if trial.fd in self._selector.get_map():
            self._selector.unregister(trial.fd)
        trial.end()
        trial.close()
        os.close(self._lesson_fd)

    def _set_trial(self, trial: Trial) -> None:
        if trial.pid < 0:  # There is nothing to import, or nothing is left.
            self._trial = None
            self._send_lesson(trial, [])
        else:
            self._trial = trial
            self._selector.register(trial.fd, selectors.EVENT_READ)

    def _check_trial(self, trial: Trial, *, has_spoken: bool) -> None:
        if has_spoken and trial.read_reports():
            self._selector.unregister(trial.fd)  # The child is about to end, which SIGCHLD reports.
        if trial.learnt is not None:
            self._hand_over(trial, trial.learnt)
        elif time.monotonic() > trial.deadline:
            trial.end()

    def _try_again(self, trial: Trial, status: int) -> None:
        if trial.fd in self._selector.get_map():
            while not trial.read_reports():
                pass
            self._selector.unregister(trial.fd)
        trial.failed(status)
        self._set_trial(trial)

    def _hand_over(self, trial: Trial, learnt: list[str]) -> None:
        if trial.fd in self._selector.get_map():
            self._selector.unregister(trial.fd)
        self._selector.unregister(self._control)
        self._trial, self._successor = None, trial.pid
        trial.take_over()
        self._control.close()
        self._send_lesson(trial, learnt)

    def _send_lesson(self, trial: Trial, learnt: list[str]) -> None:
        try:
            with os.fdopen(self._lesson_fd, "wb") as file:
                file.write(
                    json.dumps({"learnt": learnt, "unfit": trial.unfit, "raised": trial.raised}).encode()
                )
        except BrokenPipeError:
            pass  # The caller is gone, or has stopped waiting.

    def _end_after_successor(self, status: int) -> None:
        """End all workers if the caller is gone; let them finish if the successor was killed."""
        self._successor = _HAS_ENDED
        if status in (0, signal.SIGALRM):  # SIGALRM ends a successor that is stuck in its exit functions.
            for pid in self._status_fds:
                end_group(pid)
        signal.set_wakeup_fd(-1)

    def detach(self) -> None:
        """Release what only the old template needs; called in a child that may become the successor."""
        if self._threads:
            limit_loaded(dict.fromkeys(self._threads, "1"))
        leave_out_inherited()
        _signal.set_wakeup_fd(-1)
        if _tracker._fd is None:  # Newer releases of CPython close it in each process that is forked.
            _tracker._fd = self._spare_tracker_fd
        else:
            os.close(self._spare_tracker_fd)
        self._selector.close()
        for fd in (*self._status_fds.values(), self._wakeup_r, self._wakeup_w, self._lesson_fd):
            os.close(fd)

    def get_ready(self) -> None:
        """Repeat, in the successor, the preparations that come before the first fork."""
        self._left_to_do = ToDoAtExit()
        keep_torch_threads()
        if self._threads:
            limit_loaded(self._threads)
        if self._service is not None:
            self._service.prepare()
        settle_memory()

    def take_over(self) -> NoReturn:
        """Run as the template."""
        Forker(self._control, self._service, self._left_to_do, self._threads).run()

    # ------------------------------------------------------------ workers

    @staticmethod
    def _report(fd: int, number: int) -> None:
        try:
            write_signed(fd, number)
        except BrokenPipeError:
            pass  # The caller does not wait for this worker any more.

    def _become_worker(
        self, data_fd: int, foreign_fds: list[int], tracker_fd: int, inherited: list[int]
    ) -> NoReturn:
        code = 1
        try:
            _signal.set_wakeup_fd(-1)
            _signal.signal(_SIGCHLD, _signal.SIG_DFL)
            _signal.signal(_SIGINT, _signal.default_int_handler)
            if _signal.getsignal(_SIGHUP) is _ignore_hangup:
                _signal.signal(_SIGHUP, _signal.SIG_DFL)
            self._control.close()
            for fd in (*foreign_fds, self._wakeup_r, self._wakeup_w, self._spare_tracker_fd):
                os.close(fd)
            if self._trial is not None:
                self._trial.close()
                os.close(self._lesson_fd)
            _tracker._fd = tracker_fd
            leave_out_inherited()
            if self._service is None:
                _inherited_fds[:] = inherited
                code = spawn._main(data_fd, os.dup(data_fd))
            else:
                _serve(self._service, data_fd, *inherited)
        except EOFError:
            pass  # The caller has ended, or has given up this worker.
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            leaving.exit_code = code
            atexit._run_exitfuncs()
            _util._flush_std_streams()
            os._exit(code)


def _serve(service: Service, sentinel: int, connection: int) -> None:
    """Finish the start of this process as multiprocessing would, then serve."""
    # Nothing is written to this pipe; its end means that the caller has ended.
    _process._parent_process._sentinel = sentinel
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]
    _util._run_after_forkers()
    service.serve(Connection(connection))
    leave()
