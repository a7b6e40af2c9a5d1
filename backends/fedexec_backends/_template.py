"""The template: a clean process that imports the preload once and forks workers when asked.

This is :mod:`multiprocessing`'s forkserver with the differences a library needs: one for each executor
instead of one for the whole program; it ends with its executor; a preload that fails is an error that names
the module (the standard one ignores it silently); it sees the caller's ``sys.path``; nobody runs the caller's
``__main__`` again; and no socket in the file system.

The upper half runs in the caller's process, the lower half (from :func:`main`) in the template.
"""

import _signal  # type: ignore[import-not-found]  # what a new worker calls through `signal` costs 50 pages
import atexit
import ctypes
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
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice, repeat
from multiprocessing import context, process, resource_tracker, spawn, util
from multiprocessing.connection import Connection
from multiprocessing.forkserver import MAXFDS_TO_SEND, write_signed
from pathlib import Path
from typing import Any, NoReturn, Protocol

import cloudpickle

from fedexec.errors import PreloadError
from fedexec.worker import THREAD_VARIABLES, preload

__all__ = ["Service", "Template", "inherited_fd", "preparation"]

MADV_COLLAPSE = 25  # <linux/mman.h>; the mmap module does not have it
HUGE_PAGE = 2 << 20  # bytes
ARENA = 1 << 20  # bytes that Python's allocator takes from the system at a time
ARENAS = 96  # of 108 that are in use with torch imported
BLOCK = 512  # bytes: the largest that an arena is made of

_util: Any = util  # its underscored names, which type checkers do not know
_process: Any = process
_SIGCHLD, _SIGINT = int(signal.SIGCHLD), int(signal.SIGINT)


class Service(Protocol):
    """What workers do for whom a process object would be too much: the template knows it before it forks."""

    def prepare(self) -> None:
        """Do in the template, once, what need not be done in each worker."""

    def serve(self, connection: Connection) -> None:
        """Do a worker's work; it ends when this returns."""


class Template:
    """The caller's end of a template process.

    Parameters
    ----------
    modules : iterable of str
        To import before the first worker is forked.
    warmup : callable or None
        To be called after that.
    timeout : float
        Seconds that both may take.
    backend : str
        The backend's own module, which every worker needs before anything else.
    service : Service, optional
        What every worker does; without it, each reads a process object that says so.
    """

    def __init__(
        self,
        modules: Iterable[str],
        warmup: Callable[[], object] | None = None,
        timeout: float = 120.0,
        backend: str = __name__,
        service: Service | None = None,
    ) -> None:
        self.service = service
        self._modules = (backend, *modules)
        self._warmup = None if warmup is None else cloudpickle.dumps(warmup)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Start the process and wait until the preload is imported.

        Raises
        ------
        PreloadError
            Names the module, with its traceback in the template.
        """
        with self._lock:
            self._ensure_running()

    def fork(self, fds: list[int]) -> None:
        """Have a worker forked that inherits `fds`; a template that has died is replaced first.

        Parameters
        ----------
        fds : list of int
            Data pipe to read the process object from, status pipe to write pid and exit code to, the
            resource tracker's pipe, and what the process object refers to; of a service, its connection.
        """
        if len(fds) > MAXFDS_TO_SEND:
            raise ValueError(f"too many file descriptors for one worker: {len(fds)} > {MAXFDS_TO_SEND}")
        with self._lock:
            control = self._ensure_running()
            try:
                socket.send_fds(control, [b"f"], fds)
            except OSError:
                self._discard()
                socket.send_fds(self._ensure_running(), [b"f"], fds)

    def stop(self) -> None:
        """End the template and every worker that still runs. Returns when it is gone."""
        with self._lock:
            self._discard()

    def _ensure_running(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._discard()
        if self._control is None:
            self._launch()
        assert self._control is not None
        return self._control

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        wanted = {
            "preparation": preparation("fedexec-worker"),
            "parent": (process.current_process().name, os.getpid()),
            "modules": self._modules,
            "warmup": self._warmup,
            "service": pickle.dumps(self.service),
        }
        command = [sys.executable, *_util._args_from_interpreter_flags()]
        command += ["-c", f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"]
        # Ctrl+C is the caller's business: blocked until the template has a group of its own and ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                # One thread, for fork's sake; workers get their share of the cores when they are set up.
                env=os.environ | dict.fromkeys(THREAD_VARIABLES, "1"),
                process_group=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._control = ours
        try:
            assert self._process.stdin is not None
            with self._process.stdin as stdin:
                stdin.write(pickle.dumps(wanted))
            self._await_readiness(ours)
        except BaseException:
            self._process.kill()
            self._discard()
            raise

    def _await_readiness(self, control: socket.socket) -> None:
        """Follow what the template says it does; raise PreloadError if it fails, dies or takes too long."""
        doing = "fedexec"
        deadline = time.monotonic() + self._timeout
        with control.makefile("rb") as reports:
            while True:
                control.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    report = json.loads(reports.readline() or b'{"traceback": "the template process died"}')
                except TimeoutError:
                    raise PreloadError(doing, f"not done after {self._timeout:g} s") from None
                if "traceback" in report:
                    raise PreloadError(doing, report["traceback"])
                if "ready" in report:
                    break
                doing = report["doing"]
        control.settimeout(None)

    def _discard(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.wait()
            self._process = None


# ---------------------------------------------------------------- in the template

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
    arenas = [] if wanted["warmup"] is None else _reserve_arenas()

    def tell(**report: object) -> None:
        control.sendall(json.dumps(report).encode() + b"\n")

    try:
        for module in wanted["modules"]:
            tell(doing=module)
            preload([module])
            _check_fit_to_fork()
        if wanted["warmup"] is not None:
            tell(doing="warmup")
            pickle.loads(wanted["warmup"])()
            _check_fit_to_fork()
        service = pickle.loads(wanted["service"])
        if service is not None:
            _become_like_a_worker(wanted["parent"])
            service.prepare()
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
    _collapse_pages()
    _end_on_hangup(control, False)
    tell(ready=os.getpid())
    _Forker(control, service).serve()
    os._exit(0)


def preparation(name: str) -> dict[str, Any]:
    """Return what multiprocessing tells a process of its parent's, but for the parent's ``__main__``.

    Parameters
    ----------
    name : str
        Of the new process.
    """
    data = spawn.get_preparation_data(name)
    # Bytes, because the key's own type refuses to be pickled while no process is being started.
    data["authkey"] = bytes(data["authkey"])
    return {key: value for key, value in data.items() if not key.startswith("init_main")}


def _become_like_a_worker(parent: tuple[str, int]) -> None:
    """Do here what multiprocessing does in each new process before its work: workers are born so."""
    _process._current_process = process.BaseProcess(name=process.current_process().name)
    _process._process_counter = itertools.count(1)
    _process._children = set()
    _process._parent_process = _process._ParentProcess(*parent, None)  # a worker adds its sentinel
    context._force_start_method("spawn")
    _util._finalizer_registry.clear()


def _end_on_hangup(control: socket.socket, on: bool) -> None:
    """Have the kernel end this process (SIGIO) when the caller is gone, whatever an import is doing."""
    fcntl.fcntl(control, fcntl.F_SETOWN, os.getpid())
    flags = fcntl.fcntl(control, fcntl.F_GETFL)
    fcntl.fcntl(control, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)
    if on and select.select([control], [], [], 0)[0]:
        os._exit(1)  # nothing is ever sent to a template that is not ready: the caller is gone already


def _check_fit_to_fork() -> None:
    """Refuse what does not survive a fork: threads, and CUDA."""
    tasks = Path("/proc/self/task")
    threads = len(list(tasks.iterdir())) if tasks.exists() else threading.active_count()
    if threads > 1:
        names = [thread.name for thread in threading.enumerate()[1:]]
        known = f" ({', '.join(names)})" if names else ""
        raise RuntimeError(
            f"it left {threads - 1} thread(s) running{known}, which a forked worker would lose. "
            "Start them in the initializer instead, or use start_method='spawn'"
        )
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        raise RuntimeError(
            "it initialised CUDA, which a forked worker cannot use. "
            "Do that in the initializer instead, or use start_method='spawn'"
        )


def _reserve_arenas() -> list[bytes]:
    """Have Python's allocator take arenas side by side, before libraries come to lie between them.

    So they can be collapsed, which makes a task 0.9 CPU ms cheaper; taking them costs 90, once. Asking for a
    warm-up says that there will be tasks enough.

    Returns
    -------
    list of bytes
        Holds the arenas; when it is dropped, those that nothing came to lie in are given back.
    """
    size = BLOCK - b"".__sizeof__()
    blocks = deque(map(bytes, repeat(size, ARENAS * ARENA // BLOCK)))  # a list would be moved as it grows
    return list(islice(blocks, 0, None, 1000))  # one in each arena, or two


def _collapse_pages() -> None:
    """Have our memory in huge pages: there is less to copy at a fork, and to free at a worker's end.

    With torch imported: 2.8 ms instead of 11 a fork, 5 instead of 12 an exit. Needs Linux 6.1
    (MADV_COLLAPSE); what refuses stays as it is.
    """
    try:
        madvise = ctypes.CDLL(None).madvise
        maps = Path("/proc/self/maps").read_text().splitlines()
    except (AttributeError, OSError):
        return
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in maps:
        span, permissions, _, _, _, *name = line.split()
        if permissions.startswith("rw") and name in ([], ["[heap]"]):
            start, end = (int(address, 16) for address in span.split("-"))
            start, end = -(-start // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
            if start < end:
                madvise(start, end - start, MADV_COLLAPSE)


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
        pid = os.fork()
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
                code = 0
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
    try:
        service.serve(Connection(connection))
    finally:
        threading._shutdown()  # type: ignore[attr-defined]


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
