"""The contract between the executor and a backend. It is complete: a backend author needs no other file.

:class:`fedexec.executor.Executor` does what must be the same for all backends: the queue, the futures, how
many tasks run at once, time limits, retries. A :class:`Backend` decides only *where a task runs*.
"""

from __future__ import annotations

import enum
import functools
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from fedexec._system.available_resources import SIGKILL
from fedexec.usage import Node, Usage

if TYPE_CHECKING:  # Workers import this module, but not the settings.
    from fedexec.settings import Settings

__all__ = [
    "NO_NEEDS", "Backend", "Capability", "Hooks", "Needs", "Node", "Outcome", "Task", "Usage",
    "function_name", "once",
]  # fmt: skip


class Capability(enum.Flag):
    """What a backend guarantees. Check the capabilities of a backend, never its name."""

    ISOLATED = enum.auto()
    """A task runs in another process, so its crash or its memory leak cannot harm the caller."""
    FRESH_PROCESS = enum.auto()
    """No two tasks run in the same process; all memory of a task is given back when the task is done."""
    SURVIVES_DEATH = enum.auto()
    """A worker that dies fails only the task that it ran."""
    KILLS_ONE = enum.auto()
    """One running task can be ended, so ``timeout=`` has an effect."""
    RECYCLES = enum.auto()
    """A worker that holds more than ``memory_limit=`` after a task is replaced before its next task."""
    STANDS_BY = enum.auto()
    """Workers start before there are tasks, so ``standby=`` and ``max_tasks_per_child=`` have an effect."""
    SHARES_MEMORY = enum.auto()
    """Large arrays of arguments and results go through shared memory."""
    REMOTE = enum.auto()
    """Tasks run on nodes of a cluster, which admit them by their own memory and keep their time limits."""


_task_ids = itertools.count()
_ONCE = "__fedexec_once__"
F = TypeVar("F", bound=Callable[..., Any])


def once(fn: F) -> F:
    """Declare that a function must not run twice for one call, so the call is not retried when a worker dies.

    This is a decorator.

    Parameters
    ----------
    fn : callable

    Returns
    -------
    callable
        The function itself. If it cannot have attributes (a built-in function, a bound method), a partial.
    """
    try:
        setattr(fn, _ONCE, True)
    except AttributeError:
        fn = functools.partial(fn)  # type: ignore[assignment]
        setattr(fn, _ONCE, True)
    return fn


@dataclass(frozen=True, slots=True)
class Needs:
    """What a task needs of the machine that runs it; None where the caller has not said it.

    Attributes
    ----------
    memory, device_memory : int or None
        Bytes of the host's memory, and of that of one device.
    threads : int or None
        How many threads its numerical libraries use.
    """

    memory: int | None = None
    device_memory: int | None = None
    threads: int | None = None


NO_NEEDS = Needs()


@dataclass(slots=True, eq=False)
class Task:
    """One call of a function: ``fn(*args, **kwargs)``.

    Attributes
    ----------
    fn, args, kwargs : callable, tuple, and mapping of str to object
        The function and its arguments.
    doomed : bool
        Whether the task's worker must end; set before :meth:`Backend.kill` is called. A backend checks it
        when the worker has started, because `kill` may have been called before there was a worker.
    submitted : float
        Time of :func:`time.monotonic` at which the task was submitted. From then on nobody may write to its
        arguments.
    device : str or None
        UUID of the device on which the task has to compute; the executor chooses it.
    pid : int or None
        Process id of the task's worker; the backend sets it as soon as it is known.
    timeout : float or None
        Time limit in seconds, from the start of the task.
    retries : int
        How often the task runs again if its worker dies.
    tag : str or None
        The caller's name for the task in messages, such as "client 7".
    seed : int or None
        Seed of the task's random generators.
    pass_on : callable or None
        ``pass_on(stream, data)`` gets the bytes that the task writes to stdout (1) and stderr (2). None: they
        go to the streams of this process.
    needs : Needs
        What it needs of the machine, if the caller has said so.
    held_up : float
        Seconds since its start for which the task waited until the template had learnt modules. They do not
        count against `timeout`.
    id : int
        Number of the task in this process.
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
    pass_on: Callable[[int, bytes], object] | None = None
    needs: Needs = NO_NEEDS
    held_up: float = 0.0
    id: int = field(default_factory=_task_ids.__next__)

    @property
    def name(self) -> str:
        """Name of the function, and the tag if there is one, for messages."""
        name = _name(_innermost(self.fn))
        return name if self.tag is None else f"{name} [{self.tag}]"

    @property
    def kind(self) -> str:
        """Name that all tasks of the same function share: its module and its name."""
        return function_name(self.fn)

    @property
    def repeatable(self) -> bool:
        """Whether the task may run again, because its function is not declared with :func:`once`."""
        fn: Any = self.fn
        while not hasattr(fn, _ONCE):
            if not isinstance(fn, functools.partial):
                return True
            fn = fn.func
        return False


def function_name(fn: Callable[..., Any]) -> str:
    """Return the module and the name of a function; for a partial, those of the function that it calls.

    Parameters
    ----------
    fn : callable

    Returns
    -------
    str
        Such as ``"package.module.function"``.
    """
    fn = _innermost(fn)
    return f"{getattr(fn, '__module__', None) or type(fn).__module__}.{_name(fn)}"


def _innermost(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function inside partials, which may be nested."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return fn


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__qualname__", None) or type(fn).__qualname__)


@dataclass(slots=True)
class Outcome:
    """How a task has ended.

    Attributes
    ----------
    value : object
        What the function returned; None if `exception` is set.
    exception : BaseException or None
        What the function raised, or the reason why it could not run.
    usage : Usage or None
        What the task has cost, if it was measured.
    out_of_memory : bool
        Whether the exception says that memory ran out, on the host or on a device.
    """

    value: Any = None
    exception: BaseException | None = None
    usage: Usage | None = None
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Hooks:
    """Functions of the caller that run around the tasks.

    Attributes
    ----------
    initializer, initargs : callable or None, and tuple
        ``initializer(*initargs)`` is called once in every worker before its first task. Workers that start
        before there are tasks call it while they wait.
    warmup : callable or None
        Called once in the template, so that all workers inherit what it leaves in memory.
    """

    initializer: Callable[..., object] | None = None
    initargs: tuple[Any, ...] = ()
    warmup: Callable[[], object] | None = None


class Backend(ABC):
    """Runs tasks. A subclass decides where.

    The executor calls :meth:`start` once, then :meth:`run` from at most ``settings.max_workers`` threads at
    once, and finally :meth:`shutdown` once, when no task runs any more.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
        If the initializer fails, the outcome of the task is an
        :class:`~fedexec.errors.InitializerError`.

    Attributes
    ----------
    capabilities : Capability
        What the backend guarantees.
    descriptors_per_worker : int
        Most file descriptors that the caller's process has open for each worker, also while a worker is
        replaced.
    slots_changed : callable
        A backend whose number of slots can change calls it, from any thread, when the number has changed. The
        executor sets it.
    """

    capabilities: Capability = Capability(0)
    descriptors_per_worker: int = 0

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        self.settings = settings
        self.hooks = hooks
        self.slots_changed: Callable[[], None] = lambda: None

    def start(self) -> None:
        """Prepare to run tasks.

        Raises
        ------
        BackendUnavailableError
            The backend cannot run on this system.
        PreloadError
            A module of ``settings.preload`` cannot be imported.
        """

    @abstractmethod
    def run(self, task: Task) -> Outcome:
        """Run one task and wait for its end.

        If the worker will not run another task, it must have given back its device memory when this returns.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Outcome
            Also if the task raises: the outcome then holds the exception. An exception of this method itself
            becomes the exception of the future too.

        Raises
        ------
        WorkerDiedError
            The worker ended before the task did, or :meth:`kill` has ended it.
        """

    def kill(self, task: Task, number: int = SIGKILL) -> None:
        """End the worker that runs a task, if it still does; :meth:`run` then raises WorkerDiedError.

        The executor may call this from any thread. :attr:`Capability.KILLS_ONE` requires it. It must not harm
        another task.

        Parameters
        ----------
        task : Task
        number : int
            Number of the signal. At the time limit, and by ``Executor.terminate_workers``, it is SIGTERM, so
            that the worker can write its stacks to stderr and the task can clean up; SIGKILL follows if the
            worker does not end. In all other cases it is SIGKILL at once.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot end a running task")

    def kill_waiting(self) -> None:
        """End at once the workers that run no task, and those that start later.

        The executor calls this from any thread before or during :meth:`shutdown` if it was told to end all
        workers. By default there are no such workers.
        """

    def slots(self) -> int | None:
        """Return how many tasks can run at once now; None if only ``settings.max_workers`` bounds them."""
        return None

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes on which tasks run; empty if all run on the caller's machine."""
        return ()

    def restarts(self) -> Mapping[str, int]:
        """Return how many workers were replaced because of a limit, by cause: see :class:`~fedexec.Stats`."""
        return {}

    def learning(self) -> Mapping[str, Any]:
        """Return what the template has learnt, as :attr:`Stats.learning` shows it."""
        return {}

    def footprints(self) -> Mapping[str, Any]:
        """Return the footprints that nodes have measured; see :meth:`fedexec.Executor.footprints`."""
        return {}

    def rehearse(self, call: Callable[[], object], name: str) -> str | None:
        """Make a call whose effects in memory later workers inherit; see :meth:`fedexec.Executor.rehearse`.

        Parameters
        ----------
        call : callable
        name : str
            Name of the function that is called, for messages.

        Returns
        -------
        str or None
            Why workers do not inherit the effects, as a clause for a message; None if they do.
        """
        return "the backend has no template that its workers are forked from"

    def shutdown(self) -> None:
        """End all processes and give back all resources. This returns when nothing is left."""
