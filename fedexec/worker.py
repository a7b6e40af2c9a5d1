"""What happens inside a worker process. The other end is :mod:`fedexec.courier`.

A worker calls :func:`setup` once and :func:`run` for each task, whatever backend started it.
Nothing heavy may be imported here: this is the first thing that every worker imports.
"""

import _signal  # type: ignore[import-not-found]  # what a worker calls through `signal` costs it 50 pages
import atexit
import enum
import multiprocessing
import multiprocessing.connection
import os
import pickle
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import util
from typing import Any, NoReturn

if sys.platform == "linux":
    import fcntl

from fedexec import imports, inheritance, seeding
from fedexec.errors import PreloadError, is_out_of_memory
from fedexec.imports import Imports, watch
from fedexec.interface import Hooks, Usage
from fedexec.memory import device, host, own
from fedexec.pickling import dumps, send_main_by_value, show_sources
from fedexec.settings import Settings
from fedexec.stderr import listen, unread
from fedexec.transport import Delivery, UnreachableSegmentError

__all__ = [
    "Kind",
    "Reply",
    "WorkerSetup",
    "device_environment",
    "end_with_caller",
    "environment",
    "keep_torch_threads",
    "leave",
    "limit_loaded",
    "limit_threads",
    "preload",
    "prepare",
    "run",
    "setup",
    "signals_hangup",
]

LEAVE_SECONDS = 5.0  # that a worker whose work is done may take to end
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker does before its first task."""

    environ: dict[str, str]
    preload: tuple[str, ...]
    initializer: bytes | None

    @classmethod
    def of(cls, settings: Settings, hooks: Hooks) -> "WorkerSetup":
        """Pack what is asked of a worker."""
        packed = inheritance.dumps((hooks.initializer, hooks.initargs)) if hooks.initializer else None
        return cls(environment(settings), settings.preload, packed)


def environment(settings: Settings) -> dict[str, str]:
    """Return the variables that hold a worker to its share of the cores and tell it of its device.

    A number of threads that the user has set stays, unless ``threads_per_worker`` was given as well.
    """
    chosen = settings.sources.get("threads_per_worker", "default") != "default"
    limit = str(settings.threads_per_worker)
    wanted = {name: limit if chosen else os.environ.get(name, limit) for name in THREAD_VARIABLES}
    return wanted | device_environment(settings)


def device_environment(settings: Settings) -> dict[str, str]:
    """Return the variables that have a process compute on the chosen devices and see no other."""
    wanted = {}
    if settings.device is not None:
        wanted["FEDEXEC_DEVICE"] = settings.device
        if not device.is_emulated(settings.device):
            wanted["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # NVML's, by which an index was meant
            wanted["CUDA_VISIBLE_DEVICES"] = "" if settings.device == "none" else settings.device
    if device.LEDGER_VARIABLE in os.environ:
        wanted[device.LEDGER_VARIABLE] = os.environ[device.LEDGER_VARIABLE]
    return wanted


class Kind(enum.Enum):
    """What an answer is."""

    VALUE = enum.auto()
    EXCEPTION = enum.auto()
    TASK_UNREADABLE = enum.auto()
    INITIALIZER_FAILED = enum.auto()
    PRELOAD_FAILED = enum.auto()
    UNREACHABLE = enum.auto()


@dataclass(slots=True)
class Reply:
    """A worker's answer.

    Attributes
    ----------
    kind : Kind
    payload : bytes
        A packed value, or a pickled exception.
    pid : int
    traceback : str
    usage : Usage or None
    kept : bool
        The task goes on looking at memory it was sent.
    imported : tuple of str
        Modules of installed packages that the task has imported, if the caller wants to know.
    unread : bool
        It has written to stderr what the caller may not have passed on yet.
    out_of_memory : bool
        The exception says that memory ran out, on the host or on a device.
    """

    kind: Kind
    payload: bytes
    pid: int
    traceback: str = ""
    usage: Usage | None = None
    kept: bool = False
    imported: tuple[str, ...] = ()
    unread: bool = False
    out_of_memory: bool = False


_SIGALRM = int(signal.SIGALRM) if hasattr(signal, "setitimer") else None
_SIG_DFL, _SIG_UNBLOCK = int(signal.SIG_DFL), int(getattr(signal, "SIG_UNBLOCK", 0))
_util: Any = util  # its underscored names, which type checkers do not know
_setup_failure: bytes | None = None
_setup_seconds: float | None = None
_idle_bytes: int | None = None


def setup(wanted: WorkerSetup) -> None:
    """Make this process a worker. A failure is kept, and answers every task that :func:`run` is given."""
    global _setup_failure, _setup_seconds, _idle_bytes
    started = time.perf_counter()
    _leave_the_callers_group()
    end_with_caller()
    prepare()
    seeding.renew()
    limit_threads(wanted.environ)
    try:
        preload(wanted.preload)
    except PreloadError as exc:
        payload = pickle.dumps((exc.module, exc.traceback))
        _setup_failure = pickle.dumps(Reply(Kind.PRELOAD_FAILED, payload, os.getpid()))
        return
    try:
        if wanted.initializer is not None:
            fn, args = pickle.loads(wanted.initializer)
            fn(*args)
    except BaseException as exc:
        _setup_failure = pickle.dumps(_failure(Kind.INITIALIZER_FAILED, exc))
    _setup_seconds = time.perf_counter() - started
    _, _idle_bytes = host.peak_and_rss()


def prepare() -> None:
    """Do what each worker needs, and need not do if the process that it is forked from has done it."""
    watch()
    send_main_by_value()


def limit_threads(environ: Mapping[str, str]) -> None:
    """Hold this process to its share of the cores: torch, and libraries that will be loaded."""
    for name, value in environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    torch = sys.modules.get("torch")
    number = _torch_threads or _threads_of(environ, "OMP_NUM_THREADS")
    if torch is not None and number and number != torch.get_num_threads():
        torch.set_num_threads(number)


def limit_loaded(environ: Mapping[str, str]) -> None:
    """Hold the workers that are forked from this process to their share: libraries that are loaded already.

    They read their environment only once. Here this costs a worker nothing; OpenBLAS starts threads at once,
    ends them before a fork, and starts them again in a worker that computes.
    """
    from threadpoolctl import ThreadpoolController

    variables = {"openmp": "OMP_NUM_THREADS", "mkl": "MKL_NUM_THREADS", "openblas": "OPENBLAS_NUM_THREADS"}
    for library in ThreadpoolController().lib_controllers:
        variable = variables.get(library.user_api) or variables.get(library.internal_api)
        number = _threads_of(environ, variable) if variable else 0
        if library.user_api == "openmp":  # torch's setting, too
            number = _torch_threads or number
        if number and number != library.num_threads:
            library.set_num_threads(number)


def keep_torch_threads() -> None:
    """Have workers keep the number of threads that an import has told torch: where they are forked from.

    There the environment says one. A fresh interpreter keeps it anyway: it imports after it was limited.
    """
    global _torch_threads
    number = getattr(sys.modules.get("torch"), "get_num_threads", int)()
    _torch_threads = number if number > 1 else 0


_torch_threads = 0  # that an import has asked for; one cannot be told from none


def _threads_of(environ: Mapping[str, str], variable: str) -> int:
    """Return a number of threads; 0 if it is none. OpenMP allows a list, one number a nesting level."""
    number = environ.get(variable, "").partition(",")[0]
    return max(1, int(number)) if number.isdecimal() else 0


def preload(modules: Iterable[str]) -> None:
    """Import modules by name.

    Raises
    ------
    PreloadError
        One of them cannot be imported; carries its traceback.
    """
    for module in modules:
        try:
            import_module(module)
        except BaseException:
            raise PreloadError(module, traceback.format_exc()) from None


def run(message: bytes) -> bytes:
    """Run one task; its value or its exception is in the answer. Only the end of the process stops it."""
    if _setup_failure is not None:
        return _setup_failure
    delivery = Delivery(message)
    del message
    new = Imports()
    reply = _run(delivery, new)
    if delivery.learns:
        reply.imported = new.installed()
    reply.kept = not delivery.close()
    reply.unread = unread()
    return pickle.dumps(reply)


def _run(delivery: Delivery, new: Imports) -> Reply:
    if delivery.stderr is not None:
        listen(delivery.stderr)
    with seeding.seeded(delivery.seed):
        return _run_seeded(delivery, new)


def _run_seeded(delivery: Delivery, new: Imports) -> Reply:
    begun = time.perf_counter()
    try:
        device.assign(delivery.device)  # before anything is unpickled that might start it
        if delivery.sources:
            show_sources(delivery.sources)
        if delivery.path is not None:
            sys.path[:] = delivery.path
            imports.forget_other_versions()
        fn, args, kwargs = delivery.open()
        if delivery.seed is not None:
            seeding.seed_all(delivery.seed)  # again: what was unpickled may have drawn
    except UnreachableSegmentError as exc:
        return Reply(Kind.UNREACHABLE, b"", os.getpid(), str(exc))
    except BaseException as exc:
        return _failure(Kind.TASK_UNREADABLE, exc)
    meter = _Meter(new, time.perf_counter() - begun)
    try:
        value = fn(*args, **kwargs)
    except BaseException as exc:  # SystemExit too: it is the task's answer, as in concurrent.futures
        return _failure(Kind.EXCEPTION, exc, meter.read())
    usage = meter.read()
    try:
        return Reply(Kind.VALUE, delivery.answer(value), os.getpid(), usage=usage)
    except BaseException as exc:
        exc.add_note(f"fedexec: while pickling the result ({type(value).__qualname__})")
        return _failure(Kind.EXCEPTION, exc, usage)


def _failure(kind: Kind, error: BaseException, usage: Usage | None = None) -> Reply:
    text = "".join(traceback.format_exception(error))
    try:
        packed = dumps(error)
    except BaseException as exc:
        # As in concurrent.futures, what could not be pickled is replaced by the reason why not.
        exc.add_note(f"fedexec: while pickling the exception {error!r}")
        text += "\n" + "".join(traceback.format_exception(exc))
        try:
            packed = dumps(exc)
        except BaseException:
            packed = pickle.dumps(pickle.PicklingError(f"{error!r} could not be pickled: {exc!r}"))
    return Reply(kind, packed, os.getpid(), text, usage, out_of_memory=is_out_of_memory(error))


class _Meter:
    """Measures one task in this process."""

    def __init__(self, new: Imports, unpickling: float) -> None:
        self._new, self._unpickling = new, unpickling
        self._peak_is_ours = host.reset_peak()  # else an earlier task's peak would be read
        own.reset_peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Usage:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        peak, resident = host.peak_and_rss()
        on_device = own.read()
        return Usage(
            worker_pid=os.getpid(),
            wall_seconds=wall,
            cpu_seconds=cpu,
            peak_host_bytes=peak if self._peak_is_ours else None,
            end_host_bytes=resident,
            idle_host_bytes=_idle_bytes,
            device=on_device.uuid,
            peak_device_bytes=on_device.peak_bytes,
            end_device_bytes=on_device.held_bytes,
            peak_allocated_bytes=on_device.torch.peak_allocated_bytes if on_device.torch else None,
            peak_reserved_bytes=on_device.torch.peak_reserved_bytes if on_device.torch else None,
            import_seconds=self._new.seconds(),
            unpickle_seconds=self._unpickling,
            setup_seconds=_setup_seconds,
        )


def _leave_the_callers_group() -> None:
    """Lead a process group of our own: Ctrl+C is the caller's business, and one signal ends us and ours."""
    if hasattr(os, "setpgid"):
        try:
            os.setpgid(0, 0)
        except PermissionError:
            pass  # already the leader of a session
        if signal.SIGINT in signal.sigpending():  # a Ctrl+C from before: not ours either
            signal.sigwait({signal.SIGINT})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def end_with_caller() -> None:
    """End this process, and what it started, when the process that asked for it is gone, however it ended.

    Not by ``PR_SET_PDEATHSIG``, which follows the *thread* that started us.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel
    if signals_hangup(sentinel, signal.SIGKILL):
        poll = select.poll()
        poll.register(sentinel)
        if poll.poll(0):
            os.killpg(0, signal.SIGKILL)  # it was gone already
        return

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="fedexec-end-with-caller", daemon=True).start()


def signals_hangup(pipe: int, number: int) -> bool:
    """Have the kernel send this process's group a signal when the other end of a pipe is gone.

    A watching thread costs more, and does nothing while another one keeps Python's global lock. But only
    Linux can do this, and some sandboxes refuse it: False.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.fcntl(pipe, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, int(number))
        fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        return False
    return True


def leave() -> NoReturn:
    """End this worker, whose work is done, whatever its tasks have left running.

    In the order of a script's end: threads first, and with them the pools of concurrent.futures, joblib and
    loky; then multiprocessing's children and other exit functions. A worker that multiprocessing ends waits
    for children first, and joblib's idle ones then keep it for minutes. What takes longer than LEAVE_SECONDS
    ends with the worker, as its children do.
    """
    code = 1
    try:
        if _SIGALRM is not None:
            # The kernel ends a worker that is stuck, even where a thread holds Python's global lock.
            _signal.signal(_SIGALRM, _SIG_DFL)
            _signal.pthread_sigmask(_SIG_UNBLOCK, (_SIGALRM,))
            _signal.setitimer(_signal.ITIMER_REAL, LEAVE_SECONDS)
        threading._shutdown()  # type: ignore[attr-defined]  # what an interpreter that ends calls
        atexit._run_exitfuncs()
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _util._flush_std_streams()
        os._exit(code)
