"""What runs in the template: it imports the preload, warms up, then forks workers until the caller is gone.

The caller's end is :mod:`fedexec_backends._template`.
"""

import _signal  # type: ignore[import-not-found]  # what a new worker calls through `signal` costs 50 pages
import atexit
import contextlib
import fcntl
import gc
import itertools
import json
import os
import pickle
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from multiprocessing import process, resource_tracker, spawn, util
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import MAXFDS_TO_SEND, write_signed
from typing import Any, NoReturn, Protocol

from fedexec import imports
from fedexec.errors import PreloadError
from fedexec.imports import is_installed_file
from fedexec.ownership import VARIABLE
from fedexec.worker import keep_torch_threads, leave, limit_loaded, preload, prepare
from fedexec_backends import _fitness, _leaving, _pages
from fedexec_backends._leaving import (
    ToDoAtExit,
    continue_without_parent,
    end_group,
    end_what_is_left,
    end_with_parent,
    leave_out_inherited,
)
from fedexec_backends._successor import Trial, import_quietly, rehearse, silence

__all__ = ["Service", "inherited_fd", "main"]

_util: Any = util  # its underscored names, which type checkers do not know
_process: Any = process
_tracker: Any = resource_tracker._resource_tracker
_SIGCHLD, _SIGHUP, _SIGINT = int(signal.SIGCHLD), int(signal.SIGHUP), int(signal.SIGINT)
_HAS_ENDED = -2  # in place of a process's number


class Service(Protocol):
    """What workers do for whom a process object would be too much: the template knows it before it forks."""

    def prepare(self) -> None:
        """Do in the template, once, what need not be done in each worker."""

    def serve(self, connection: Connection) -> None:
        """Do a worker's work; it ends when this returns."""


_inherited_fds: list[int] = []


def inherited_fd(index: int) -> int:
    """Return, in a worker, a descriptor that its process object refers to by number."""
    return _inherited_fds[index]


def main() -> NoReturn:
    """Import what is asked for, warm up, say so, then fork until the caller is gone."""
    os.environ.pop(VARIABLE, None)  # What tasks start is not ours to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    control = socket.socket(fileno=int(sys.argv[1]))
    _end_on_hangup(control, True)
    atexit.register(end_what_is_left, os.getpid())  # the first, so the last to be done
    wanted = pickle.load(sys.stdin.buffer)
    _tracker._fd = wanted["tracker"]  # the caller's: one of this process's own would end with it
    spawn.prepare(wanted["preparation"])
    _util._close_stdin()
    arenas = [] if wanted["warmup"] is None else _pages.reserve_arenas()

    def tell(**report: object) -> None:
        control.sendall(json.dumps(report).encode() + b"\n")

    try:
        put_back = _fitness.show_devices()
        with _fitness.no_torch_threads():
            for module in wanted["modules"]:
                tell(doing=module)
                preload([module])
                _require_fitness(module)
            with silence():
                for module in wanted["learnt"]:
                    import_quietly(module)
                imports.learnt.update(wanted["learnt"])
            if wanted["warmup"] is not None:
                tell(doing=wanted["warmup_name"])
                before = set(sys.modules)
                pickle.loads(wanted["warmup"])()
                _require_fitness(_whose(before) or wanted["warmup_name"])
            for name, call in wanted["rehearsals"]:
                tell(doing=name)
                with silence(), contextlib.suppress(Exception):  # It went well before
                    rehearse(call)
                _require_fitness(name)
        put_back()
        keep_torch_threads()
        if wanted["threads"]:
            limit_loaded(wanted["threads"])
        prepare()
        service = pickle.loads(wanted["service"])
        left_to_do = ToDoAtExit()
        if service is not None:
            _become_like_a_worker(wanted["parent"])
            service.prepare()
    except BaseException as exc:
        _end_on_hangup(control, False)  # The caller hangs up when it has heard this.
        if isinstance(exc, _UnfitError):
            tell(unfit=exc.reason, module=exc.module)
        else:
            tell(traceback=exc.traceback if isinstance(exc, PreloadError) else traceback.format_exc())
        leave()
    del arenas
    _settle_memory()
    _end_on_hangup(control, False)
    tell(ready=os.getpid())
    _Forker(control, service, left_to_do, wanted["threads"]).run()


def _settle_memory() -> None:
    """Arrange what all workers share so that they neither copy nor free more of it than they must."""
    gc.collect()
    gc.freeze()  # a worker's collector shall not touch it
    _pages.collapse()
    _pages.make_room()


def _become_like_a_worker(parent: tuple[str, int]) -> None:
    """Do here what multiprocessing does in each new process before its work: workers are born so."""
    _process._current_process = process.BaseProcess(name=process.current_process().name)
    _process._process_counter = itertools.count(1)
    _process._parent_process = _process._ParentProcess(*parent, None)  # a worker adds its sentinel


def _end_on_hangup(control: socket.socket, on: bool) -> None:
    """Have the kernel end this process, and what an import has started, (SIGIO) when the caller is gone.

    Where that is refused this process alone ends, with the thread that has started it and waits for it. Off,
    it is continued then if it is stopped: it sees by itself that the caller is gone.
    """
    try:
        fcntl.fcntl(control, fcntl.F_SETOWN, -os.getpgrp())
        flags = fcntl.fcntl(control, fcntl.F_GETFL)
        fcntl.fcntl(control, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)
    except OSError:
        if on:
            end_with_parent()
    if not on:
        continue_without_parent()
    if on and wait([control], 0):  # `select.select` refuses descriptors above 1,023
        os._exit(1)  # nothing is ever sent to a template that is not ready: the caller is gone already


class _UnfitError(Exception):
    """A module has made this process unfit to be forked."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(module, reason)
        self.module, self.reason = module, reason


def _require_fitness(module: str) -> None:
    """Raise _UnfitError if this process is unfit to be forked since `module` was imported."""
    if reason := _fitness.why_unfit():
        raise _UnfitError(module, reason)


def _whose(before: set[str]) -> str:
    """Name the user's own modules that a warm-up has imported, so that a complaint leads to them."""
    new = [name for name in sys.modules if name not in before and _is_users_own(name)]
    packages = {name.rpartition(".")[0] for name in new}
    return ", ".join(name for name in new if name not in packages)


def _is_users_own(name: str) -> bool:
    """Return whether a module is neither Python's nor installed nor ours."""
    file = getattr(sys.modules[name], "__file__", None)
    if file is None or name.partition(".")[0] in ("fedexec", "fedexec_backends"):
        return False
    return not is_installed_file(file)


def _go_on(signum: int, frame: object) -> None:
    """Outlive the SIGHUP of a stopped group whose caller is gone: the workers are ended first."""


class _Forker:
    """Forks workers, reaps them, and ends them all when the caller is gone. One thread, for fork's sake."""

    def __init__(
        self, control: socket.socket, service: Service | None, left_to_do: ToDoAtExit, threads: dict[str, str]
    ) -> None:
        self._control = control
        self._service = service
        self._left_to_do = left_to_do
        self._threads = threads  # that workers compute with, by variable; none where that is one
        self._status_fds: dict[int, int] = {}  # pid -> where the caller waits for its exit code
        self._trial: Trial | None = None  # while it learns
        self._lesson_fd = -1  # where the caller waits for what becomes of that
        self._successor = -1  # its pid, once it has taken this process's place
        self._selector = selectors.DefaultSelector()
        self._wakeup_r, self._wakeup_w = os.pipe()
        os.set_blocking(self._wakeup_r, False)
        os.set_blocking(self._wakeup_w, False)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        # The caller, or what was imported, may have blocked it: then no worker's end would be heard of.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        signal.set_wakeup_fd(self._wakeup_w)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, _go_on)

    def run(self) -> NoReturn:
        """Do what the caller asks until it closes its end; of one that has a successor, until that ends."""
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
                self._follow(self._trial, has_spoken=self._trial.fd in ready)
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
        pid = _fitness.fork()
        if pid == 0:
            foreign = [status_fd, *self._status_fds.values()]
            self._become_worker(data_fd, foreign, tracker_fd, list(inherited))
        try:
            os.setpgid(pid, pid)  # here as well as in the worker: whoever comes first
        except OSError:
            pass
        self._report(status_fd, pid)
        self._status_fds[pid] = status_fd
        for fd in (data_fd, tracker_fd, *inherited):
            os.close(fd)

    def _end_stopped(self) -> None:
        """Kill the child that is, or may become, the template if it has been stopped: it answers nobody."""
        for pid in (self._successor, -1 if self._trial is None else self._trial.pid):
            with contextlib.suppress(ChildProcessError):
                if pid > 0 and os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None:
                    os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            # Told before it is reaped: who sees that a worker is gone can rely on having been told.
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            end_group(pid)  # what a task left running; not reaped yet, it still has its number
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
        """Have a child import modules, and take this process's place if it is fit to."""
        with os.fdopen(names_fd, "rb") as file:
            wanted = json.loads(file.readline())
            rehearsal = (wanted["rehearsal"], file.read()) if "rehearsal" in wanted else None
        if self._trial is not None:  # Whoever asked for it has not waited: nobody will take it over.
            self._give_up(self._trial)
        self._lesson_fd = lesson_fd
        self._set_trial(Trial(wanted["modules"], self, wanted["seconds"], rehearsal, wanted.get("path")))

    def _give_up(self, trial: Trial) -> None:
        if trial.fd in self._selector.get_map():
            self._selector.unregister(trial.fd)
        trial.end()
        trial.close()
        os.close(self._lesson_fd)

    def _set_trial(self, trial: Trial) -> None:
        if trial.pid < 0:  # nothing to import, or nothing left
            self._trial = None
            self._tell_lesson(trial, [])
        else:
            self._trial = trial
            self._selector.register(trial.fd, selectors.EVENT_READ)

    def _follow(self, trial: Trial, *, has_spoken: bool) -> None:
        if has_spoken and trial.hear():
            self._selector.unregister(trial.fd)  # it ends, which will be heard of
        if trial.learnt is not None:
            self._hand_over(trial, trial.learnt)
        elif time.monotonic() > trial.deadline:
            trial.end()

    def _try_again(self, trial: Trial, status: int) -> None:
        if trial.fd in self._selector.get_map():
            while not trial.hear():
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
        self._tell_lesson(trial, learnt)

    def _tell_lesson(self, trial: Trial, learnt: list[str]) -> None:
        try:
            with os.fdopen(self._lesson_fd, "wb") as file:
                file.write(
                    json.dumps({"learnt": learnt, "unfit": trial.unfit, "raised": trial.raised}).encode()
                )
        except BrokenPipeError:
            pass  # the caller is gone, or does not wait any more

    def _end_after_successor(self, status: int) -> None:
        """End too: with the workers if the caller is gone; if the successor was killed, they may finish."""
        self._successor = _HAS_ENDED
        if status in (0, signal.SIGALRM):  # the latter ends what is stuck in its exit functions
            for pid in self._status_fds:
                end_group(pid)
        signal.set_wakeup_fd(-1)

    def detach(self) -> None:
        """Let go of what only the old template needs; called in a child that may become its successor."""
        if self._threads:
            limit_loaded(dict.fromkeys(self._threads, "1"))
        leave_out_inherited()
        _signal.set_wakeup_fd(-1)
        self._selector.close()
        for fd in (*self._status_fds.values(), self._wakeup_r, self._wakeup_w, self._lesson_fd):
            os.close(fd)

    def get_ready(self) -> None:
        """Do once more what is done before workers are forked."""
        self._left_to_do = ToDoAtExit()
        keep_torch_threads()
        if self._threads:
            limit_loaded(self._threads)
        if self._service is not None:
            self._service.prepare()
        _settle_memory()

    def take_over(self) -> NoReturn:
        """Be the template."""
        _Forker(self._control, self._service, self._left_to_do, self._threads).run()

    # ------------------------------------------------------------ workers

    @staticmethod
    def _report(fd: int, number: int) -> None:
        try:
            write_signed(fd, number)
        except BrokenPipeError:
            pass  # nobody waits for this worker any more

    def _become_worker(
        self, data_fd: int, foreign_fds: list[int], tracker_fd: int, inherited: list[int]
    ) -> NoReturn:
        code = 1
        try:
            _signal.set_wakeup_fd(-1)
            _signal.signal(_SIGCHLD, _signal.SIG_DFL)
            _signal.signal(_SIGINT, _signal.default_int_handler)
            if _signal.getsignal(_SIGHUP) is _go_on:
                _signal.signal(_SIGHUP, _signal.SIG_DFL)
            self._control.close()
            for fd in (*foreign_fds, self._wakeup_r, self._wakeup_w):
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
            pass  # the caller ended, or gave this worker up
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            _leaving.exit_code = code
            atexit._run_exitfuncs()
            _util._flush_std_streams()
            os._exit(code)


def _serve(service: Service, sentinel: int, connection: int) -> None:
    """Do in a worker what is left of a process object's work, then what it is there for."""
    _process._parent_process._sentinel = sentinel  # nothing is written to it: it ends with the caller
    threading.main_thread()._set_native_id()  # type: ignore[attr-defined]
    _util._run_after_forkers()
    service.serve(Connection(connection))
    leave()
