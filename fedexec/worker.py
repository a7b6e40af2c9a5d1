"""What happens inside a worker process, and the bytes that go there and back.

Every backend that leaves the caller's process uses these: the caller packs a task with :func:`dump_task` and
reads the answer with :func:`load_reply`; the worker calls :func:`setup` once and :func:`run` for each task.
Nothing heavy may be imported here: this is the first thing that every worker imports.
"""

import enum
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures.process import _RemoteTraceback as RemoteTraceback
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import cloudpickle

from fedexec.errors import InitializerError, PreloadError, UnpickleError
from fedexec.interface import Initializer, Outcome, Task, Usage
from fedexec.settings import Settings

__all__ = [
    "WorkerSetup",
    "dump_task",
    "end_with_caller",
    "load_reply",
    "preload",
    "run",
    "setup",
    "thread_limits",
]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


# ---------------------------------------------------------------- in the caller's process


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker does before its first task."""

    environ: dict[str, str]
    preload: tuple[str, ...]
    initializer: bytes | None

    @classmethod
    def of(cls, settings: Settings, initializer: Initializer | None) -> "WorkerSetup":
        """Pack what the settings ask of a worker."""
        packed = None if initializer is None else cloudpickle.dumps((initializer.fn, initializer.args))
        return cls(thread_limits(settings), settings.preload, packed)


def thread_limits(settings: Settings) -> dict[str, str]:
    """Return the environment that holds a worker to its share of the cores.

    A variable the user has set stays, unless ``threads_per_worker`` was given as well.
    """
    chosen = settings.sources.get("threads_per_worker", "default") != "default"
    limit = str(settings.threads_per_worker)
    return {name: limit for name in THREAD_VARIABLES if chosen or name not in os.environ}


def dump_task(task: Task) -> bytes:
    """Pickle one call; closures, lambdas and what ``__main__`` defines travel by value.

    Raises
    ------
    Exception
        Whatever pickling raised, with a note that names the argument.
    """
    try:
        return cloudpickle.dumps((task.fn, task.args, dict(task.kwargs)))  # type: ignore[no-any-return]
    except BaseException as exc:
        exc.add_note(f"fedexec: while pickling {_culprit(task)} of {task.name}")
        raise


def _culprit(task: Task) -> str:
    """Name the part of a call that does not pickle."""
    parts: list[tuple[str, Any]] = [("the function itself", task.fn)]
    parts += [(f"argument {index}", value) for index, value in enumerate(task.args)]
    parts += [(f"argument {name!r}", value) for name, value in task.kwargs.items()]
    for label, value in parts:
        try:
            cloudpickle.dumps(value)
        except BaseException:
            return f"{label} ({type(value).__qualname__})"
    return "the call"


def load_reply(data: bytes, task: Task) -> Outcome:
    """Turn a worker's answer into an outcome; never raises."""
    reply: _Reply = pickle.loads(data)
    if reply.kind is _Kind.PRELOAD_FAILED:
        module, text = pickle.loads(reply.payload)
        return Outcome(exception=PreloadError(module, text))
    try:
        value = pickle.loads(reply.payload)
    except BaseException as exc:  # also a SystemExit out of __setstate__: this thread serves all futures
        what = "result" if reply.kind is _Kind.VALUE else "exception"
        error = UnpickleError(what, task.name, repr(exc))
        if reply.traceback:
            error.add_note(f"What happened in the worker:\n{reply.traceback}")
        error.__cause__ = exc
        return Outcome(exception=error, usage=reply.usage)
    if reply.kind is _Kind.VALUE:
        return Outcome(value=value, usage=reply.usage)
    value.__cause__ = RemoteTraceback(f'\n"""\n{reply.traceback}"""')  # type: ignore[arg-type]  # it takes text
    wrapper: Exception
    if reply.kind is _Kind.TASK_UNREADABLE:
        wrapper = UnpickleError("task", task.name, repr(value))
    elif reply.kind is _Kind.INITIALIZER_FAILED:
        wrapper = InitializerError(reply.pid, repr(value))
    else:
        return Outcome(exception=value, usage=reply.usage)
    wrapper.__cause__ = value
    return Outcome(exception=wrapper)


# ---------------------------------------------------------------- in the worker


class _Kind(enum.Enum):
    VALUE = enum.auto()
    EXCEPTION = enum.auto()
    TASK_UNREADABLE = enum.auto()
    INITIALIZER_FAILED = enum.auto()
    PRELOAD_FAILED = enum.auto()


@dataclass(frozen=True, slots=True)
class _Reply:
    kind: _Kind
    payload: bytes
    pid: int
    traceback: str = ""
    usage: Usage | None = None


_setup_failure: bytes | None = None


def setup(wanted: WorkerSetup) -> None:
    """Make this process a worker. A failure is kept, and answers every task that :func:`run` is given."""
    global _setup_failure
    _leave_the_callers_group()
    end_with_caller()
    os.environ.update(wanted.environ)
    try:
        preload(wanted.preload)
    except PreloadError as exc:
        payload = pickle.dumps((exc.module, exc.traceback))
        _setup_failure = pickle.dumps(_Reply(_Kind.PRELOAD_FAILED, payload, os.getpid()))
        return
    try:
        if wanted.initializer is not None:
            fn, args = pickle.loads(wanted.initializer)
            fn(*args)
    except BaseException as exc:
        _setup_failure = _failure(_Kind.INITIALIZER_FAILED, exc)


def preload(modules: Iterable[str], before_each: Callable[[str], object] = lambda module: None) -> None:
    """Import modules by name.

    Raises
    ------
    PreloadError
        One of them cannot be imported; carries its traceback.
    """
    for module in modules:
        before_each(module)
        try:
            import_module(module)
        except BaseException:
            raise PreloadError(module, traceback.format_exc()) from None


def run(payload: bytes) -> bytes:
    """Run one task; its value or its exception is in the answer. Only the end of the process stops it."""
    if _setup_failure is not None:
        return _setup_failure
    try:
        fn, args, kwargs = pickle.loads(payload)
    except BaseException as exc:
        return _failure(_Kind.TASK_UNREADABLE, exc)
    del payload
    meter = _Meter()
    try:
        value = fn(*args, **kwargs)
    except BaseException as exc:  # SystemExit too: it is the task's answer, as in concurrent.futures
        return _failure(_Kind.EXCEPTION, exc, meter.read())
    usage = meter.read()
    try:
        packed = cloudpickle.dumps(value)
    except BaseException as exc:
        exc.add_note(f"fedexec: while pickling the result ({type(value).__qualname__})")
        return _failure(_Kind.EXCEPTION, exc, usage)
    return pickle.dumps(_Reply(_Kind.VALUE, packed, os.getpid(), usage=usage))


def _failure(kind: _Kind, error: BaseException, usage: Usage | None = None) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        packed = cloudpickle.dumps(error)
    except BaseException as exc:
        # As in concurrent.futures, what could not be pickled is replaced by the reason why not.
        exc.add_note(f"fedexec: while pickling the exception {error!r}")
        text += "\n" + "".join(traceback.format_exception(exc))
        try:
            packed = cloudpickle.dumps(exc)
        except BaseException:
            packed = pickle.dumps(pickle.PicklingError(f"{error!r} could not be pickled: {exc!r}"))
    return pickle.dumps(_Reply(kind, packed, os.getpid(), text, usage))


class _Meter:
    """Measures one task in this process."""

    def __init__(self) -> None:
        self._peak_is_ours = _reset_peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Usage:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        resident = _resident_bytes()
        return Usage(
            worker_pid=os.getpid(),
            wall_seconds=wall,
            cpu_seconds=cpu,
            peak_host_bytes=resident.get("VmHWM") if self._peak_is_ours else None,
            end_host_bytes=resident.get("VmRSS"),
        )


def _reset_peak() -> bool:
    """Set the kernel's high-water mark back to the present; without it an earlier task's peak is read."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _resident_bytes() -> dict[str, int]:
    """Read VmHWM and VmRSS in bytes; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if line.startswith(("VmHWM", "VmRSS")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


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

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="fedexec-end-with-caller", daemon=True).start()
