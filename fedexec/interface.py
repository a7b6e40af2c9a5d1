"""The whole contract between the executor and a backend; a backend author reads this file and no other.

:class:`fedexec.executor.Executor` owns what must be the same everywhere: the queue, the futures, how many
tasks are in flight, deadlines, retries. A :class:`Backend` owns only *where a task runs*.
"""

import enum
import functools
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from fedexec._system.machine import SIGKILL
from fedexec.settings import Settings

__all__ = ["Backend", "Capability", "Hooks", "Outcome", "Task", "Usage", "function_name", "once"]


class Capability(enum.Flag):
    """A promise a backend makes. Ask for the promise, never for the backend's name."""

    ISOLATED = enum.auto()
    """A task runs in another process: its crash or its leak cannot reach the caller."""
    FRESH_PROCESS = enum.auto()
    """No task sees a process in which another one ran; all its memory comes back when it is done."""
    SURVIVES_DEATH = enum.auto()
    """A worker that dies fails the task it ran, and no other."""
    KILLS_ONE = enum.auto()
    """One running task can be ended: ``timeout=`` holds."""
    RECYCLES = enum.auto()
    """A worker that holds more than ``memory_limit=`` is replaced before its next task."""
    STANDS_BY = enum.auto()
    """Workers wait before there is work: ``standby=`` and ``max_tasks_per_child=`` hold."""
    SHARES_MEMORY = enum.auto()
    """Large arrays reach the worker, and its result the caller, through shared memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one task cost. What was not measured is None.

    Attributes
    ----------
    worker_pid : int
        Process that ran the task.
    wall_seconds, cpu_seconds : float
        From the first to the last instruction of the task; CPU time is the whole process's, all threads.
    peak_host_bytes : int or None
        Highest resident set of the worker while the task ran.
    end_host_bytes : int or None
        Resident set of the worker when the task was done.
    idle_host_bytes : int or None
        Resident set of the worker before its first task.
    device : str or None
        UUID of the device the worker computed on; "EMULATED-..." if it is emulated.
    peak_device_bytes, end_device_bytes : int or None
        What the worker held there, its context included: the most while the task ran, and when it was done.
        0 only where it is known to have held nothing.
    peak_allocated_bytes, peak_reserved_bytes : int or None
        The peaks of torch's allocator while the task ran.
    import_seconds : float or None
        How long imports took: of what unpickling the call needed, and of the task itself (then they are part
        of its `wall_seconds`).
    unpickle_seconds : float or None
        From the message to the function and its arguments, with the imports that they need.
    setup_seconds : float or None
        What the worker's set-up took (preload, initializer) before its first task; part of no task's time
        where workers stand by.
    """

    worker_pid: int
    wall_seconds: float
    cpu_seconds: float
    peak_host_bytes: int | None = None
    end_host_bytes: int | None = None
    idle_host_bytes: int | None = None
    device: str | None = None
    peak_device_bytes: int | None = None
    end_device_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    import_seconds: float | None = None
    unpickle_seconds: float | None = None
    setup_seconds: float | None = None

    @property
    def may_hold_device(self) -> bool:
        """Whether the worker may have held device memory when it was done: a yes where it is unknown."""
        if self.end_device_bytes is not None:
            return self.end_device_bytes > 0
        return self.device is not None or self.peak_reserved_bytes is not None

    def as_dict(self) -> dict[str, Any]:
        """Return the usage as JSON knows it."""
        return asdict(self)


_task_ids = itertools.count()
_ONCE = "__fedexec_once__"
F = TypeVar("F", bound=Callable[..., Any])


def once(fn: F) -> F:
    """Declare that a function must not run twice for one call: it is never tried again, whatever it dies of.

    A decorator. What cannot carry a mark (a built-in, a bound method) is wrapped in a partial that does.
    """
    try:
        setattr(fn, _ONCE, True)
    except AttributeError:
        fn = functools.partial(fn)  # type: ignore[assignment]
        setattr(fn, _ONCE, True)
    return fn


@dataclass(slots=True, eq=False)
class Task:
    """One call: ``fn(*args, **kwargs)``.

    Attributes
    ----------
    doomed : bool
        Set before :meth:`Backend.kill` is called. A backend looks at it when the worker has started, because
        the call may have come too early to find one.
    submitted : float
        When, by :func:`time.monotonic`: from then on nobody writes to its arguments.
    device : str or None
        UUID of the device it is to compute on; the executor's choice.
    pid : int or None
        Of the worker that runs it; the backend notes it as soon as it knows.
    timeout : float or None
        Seconds it may take, from its start.
    retries : int
        How often it runs again when its worker died.
    tag : str or None
        What the caller calls it, for messages: "client 7".
    seed : int or None
        Of the random numbers that it draws.
    held_up : float
        Seconds that it has waited, since its start, for workers to learn: they are no part of its time.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    doomed: bool = False
    submitted: float = field(default_factory=time.monotonic)
    device: str | None = None
    pid: int | None = None
    timeout: float | None = None
    retries: int = 0
    tag: str | None = None
    seed: int | None = None
    held_up: float = 0.0
    id: int = field(default_factory=_task_ids.__next__)

    @property
    def name(self) -> str:
        """The function's name, and its tag if it has one, for messages."""
        name = _name(_innermost(self.fn))
        return name if self.tag is None else f"{name} [{self.tag}]"

    @property
    def kind(self) -> str:
        """What tasks of the same function have in common."""
        return function_name(self.fn)

    @property
    def repeatable(self) -> bool:
        """Whether it may run again: its function is not declared with :func:`once`."""
        fn: Any = self.fn
        while not hasattr(fn, _ONCE):
            if not isinstance(fn, functools.partial):
                return True
            fn = fn.func
        return False


def function_name(fn: Callable[..., Any]) -> str:
    """Return module and name of a function; of a partial, those of the function that it calls at last."""
    fn = _innermost(fn)
    return f"{getattr(fn, '__module__', None) or type(fn).__module__}.{_name(fn)}"


def _innermost(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a function is a partial of, as deep as it goes."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__qualname__", None) or type(fn).__qualname__)


@dataclass(slots=True)
class Outcome:
    """How a task ended: a value, or an exception; and what it cost, if known."""

    value: Any = None
    exception: BaseException | None = None
    usage: Usage | None = None
    out_of_memory: bool = False  # the exception says so: of the host or of a device


@dataclass(frozen=True, slots=True)
class Hooks:
    """The caller's own functions around the tasks.

    Attributes
    ----------
    initializer, initargs : callable or None, and tuple
        Called once in every worker before its first task; where workers stand by, while they wait.
    warmup : callable or None
        Called once where workers are forked from, so that each of them is born warm.
    """

    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    warmup: Callable[[], object] | None = None


class Backend(ABC):
    """Where tasks run.

    The executor calls :meth:`start` once, then :meth:`run` from at most ``settings.max_workers`` threads
    at once, and :meth:`shutdown` once, when no task runs any more.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
        An initializer that fails is an outcome with :class:`~fedexec.errors.InitializerError`.
    """

    capabilities: Capability = Capability(0)
    descriptors_per_worker: int = 0  # that the caller has open, at most, while a worker is replaced

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        self.settings = settings
        self.hooks = hooks

    def start(self) -> None:
        """Get ready.

        Raises
        ------
        BackendUnavailableError
            It cannot run here.
        PreloadError
            A module of ``settings.preload`` cannot be imported.
        """

    @abstractmethod
    def run(self, task: Task) -> Outcome:
        """Run one task and wait for it.

        When this returns, a worker that will not serve again has given its device memory back.

        What the task raises belongs into the outcome. Whatever this method itself raises becomes the
        future's exception too.

        Raises
        ------
        WorkerDiedError
            The worker ended under the task, or :meth:`kill` ended it.
        """

    def kill(self, task: Task, number: int = SIGKILL) -> None:
        """End the worker that runs `task`, if it runs it still; :meth:`run` then raises WorkerDiedError.

        Called from any thread; needed for :attr:`Capability.KILLS_ONE`. Must not hurt another task.

        Parameters
        ----------
        number : int
            The signal: SIGTERM at a deadline, so that the worker can say where it is and its task clean up;
            SIGKILL if that does not help, and whenever there is no time for it.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot end a running task")

    def restarts(self) -> Mapping[str, int]:
        """Return how many workers were replaced because of a limit, by cause; see :mod:`fedexec.memory`."""
        return {}

    def learning(self) -> Mapping[str, Any]:
        """Return what workers have learnt to be born with; :attr:`Stats.learning` shows it."""
        return {}

    def rehearse(self, call: Callable[[], object], name: str) -> str | None:
        """Have workers be born with what a call leaves in memory; see :meth:`fedexec.Executor.rehearse`.

        Parameters
        ----------
        call : callable
        name : str
            Of what it calls, for messages.

        Returns
        -------
        str or None
            Why they are not: a sentence that begins with "it".
        """
        return "it has no process that its workers are forked from"

    def shutdown(self) -> None:
        """End every process and give everything back. Returns when nothing is left."""
