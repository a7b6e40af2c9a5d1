"""What runs in the template: it imports the preload, warms up, then forks workers until the caller is gone.

The caller's end is :mod:`fedexec_backends._template`.
"""

import _signal  # type: ignore[import-not-found]  # what a new worker calls through `signal` costs 50 pages
import atexit
import fcntl
import gc
import itertools
import json
import os
import pickle
import select
import selectors
import signal
import socket
import sys
import threading
import traceback
from multiprocessing import process, resource_tracker, spawn, util
from multiprocessing.connection import Connection
from multiprocessing.forkserver import MAXFDS_TO_SEND, write_signed
from typing import Any, NoReturn, Protocol

from fedexec.errors import PreloadError
from fedexec.worker import find_thread_pools, leave, preload
from fedexec_backends import _fitness, _pages

__all__ = ["Service", "inherited_fd", "main"]

_util: Any = util  # its underscored names, which type checkers do not know
_process: Any = process
_SIGCHLD, _SIGINT = int(signal.SIGCHLD), int(signal.SIGINT)


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
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    control = socket.socket(fileno=int(sys.argv[1]))
    _end_on_hangup(control, True)
    wanted = pickle.load(sys.stdin.buffer)
    spawn.prepare(wanted["preparation"])
    _util._close_stdin()
    arenas = [] if wanted["warmup"] is None else _pages.reserve_arenas()

    def tell(**report: object) -> None:
        control.sendall(json.dumps(report).encode() + b"\n")

    try:
        put_back = _fitness.show_devices()
        for module in wanted["modules"]:
            tell(doing=module)
            preload([module])
            _require_fitness(module)
        if wanted["warmup"] is not None:
            tell(doing=wanted["warmup_name"])
            before = set(sys.modules)
            pickle.loads(wanted["warmup"])()
            _require_fitness(_whose(before) or wanted["warmup_name"])
        put_back()
        if wanted["threads"]:
            find_thread_pools()
        service = pickle.loads(wanted["service"])
        if service is not None:
            _become_like_a_worker(wanted["parent"])
            service.prepare()
    except _UnfitError as exc:
        tell(unfit=exc.reason, module=exc.module)
        os._exit(1)
    except PreloadError as exc:
        tell(traceback=exc.traceback)
        os._exit(1)
    except BaseException:
        tell(traceback=traceback.format_exc())
        os._exit(1)
    atexit._clear()  # what a preload registered is not for workers to do
    atexit.register(_util._exit_function)
    del arenas
    gc.collect()
    gc.freeze()  # a worker's collector shall not touch, and so copy, what all workers share
    _pages.collapse()
    _end_on_hangup(control, False)
    tell(ready=os.getpid())
    _Forker(control, service).serve()
    os._exit(0)


def _become_like_a_worker(parent: tuple[str, int]) -> None:
    """Do here what multiprocessing does in each new process before its work: workers are born so."""
    _process._current_process = process.BaseProcess(name=process.current_process().name)
    _process._process_counter = itertools.count(1)
    _process._children = set()
    _process._parent_process = _process._ParentProcess(*parent, None)  # a worker adds its sentinel
    _util._finalizer_registry.clear()


def _end_on_hangup(control: socket.socket, on: bool) -> None:
    """Have the kernel end this process (SIGIO) when the caller is gone, whatever an import is doing."""
    fcntl.fcntl(control, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(control, fcntl.F_GETFL)
    fcntl.fcntl(control, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)
    if on and select.select([control], [], [], 0)[0]:
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
    return not file.startswith(os.path.dirname(os.__file__)) and "-packages" not in file  # noqa: PTH120


class _Forker:
    """Forks workers, reaps them, and ends them all when the caller is gone. One thread, for fork's sake."""

    def __init__(self, control: socket.socket, service: Service | None) -> None:
        self._control = control
        self._service = service
        self._status_fds: dict[int, int] = {}  # pid -> where the caller waits for its exit code
        self._wakeup_r, self._wakeup_w = os.pipe()
        os.set_blocking(self._wakeup_r, False)
        os.set_blocking(self._wakeup_w, False)
        signal.signal(signal.SIGCHLD, lambda signum, frame: None)
        signal.set_wakeup_fd(self._wakeup_w)

    def serve(self) -> None:
        """Do what the caller asks until it closes its end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._control, selectors.EVENT_READ)
            selector.register(self._wakeup_r, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wakeup_r in ready:
                    os.read(self._wakeup_r, 65536)
                    self._reap()
                if self._control in ready and not self._answer():
                    break
        for pid in self._status_fds:
            _end_group(pid)

    def _answer(self) -> bool:
        try:
            message, fds, _, _ = socket.recv_fds(self._control, 1, MAXFDS_TO_SEND)
        except OSError:
            return False
        if not message:
            return False
        data_fd, status_fd, tracker_fd, *inherited = fds
        pid = _fitness.fork()
        if pid == 0:
            self._become_worker(data_fd, [status_fd, *self._status_fds.values()], tracker_fd, inherited)
        try:
            os.setpgid(pid, pid)  # here as well as in the worker: whoever comes first
        except OSError:
            pass
        self._report(status_fd, pid)
        self._status_fds[pid] = status_fd
        for fd in (data_fd, tracker_fd, *inherited):
            os.close(fd)
        return True

    def _reap(self) -> None:
        while True:
            # Told before it is reaped: who sees that a worker is gone can rely on having been told.
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            _end_group(ended.si_pid)  # what a task left running; not reaped yet, it still has its number
            status_fd = self._status_fds.pop(ended.si_pid, None)
            if status_fd is not None:
                killed = ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED)
                self._report(status_fd, -ended.si_status if killed else ended.si_status)
                os.close(status_fd)
            os.waitpid(ended.si_pid, 0)

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
            self._control.close()
            for fd in (*foreign_fds, self._wakeup_r, self._wakeup_w):
                os.close(fd)
            tracker: Any = resource_tracker._resource_tracker
            tracker._fd = tracker_fd
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


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
