"""All exceptions that fedexec itself raises. An exception of a task reaches the caller unchanged.

::

    FedexecError
    ├── SettingsError (ValueError)                a setting is invalid
    │   └── UnknownBackendError                   there is no backend of that name
    ├── BackendUnavailableError (ImportError)     the backend's package is not installed
    ├── PreloadError (BrokenProcessPool)          a module of the preload cannot be imported
    ├── InitializerError (BrokenProcessPool)      the initializer raised
    ├── TransferError (MemoryError)               arrays are too large to be sent
    ├── DeviceError                               a device does not exist, or does not answer
    └── WorkerError                               one task failed because of its worker
        ├── WorkerDiedError (BrokenProcessPool)   the process of the task has ended
        │   └── NodeLostError                     the node of the task does not answer any more
        ├── UnpickleError (BrokenProcessPool)     a task, result or exception cannot be unpickled
        ├── WorkerMemoryError (MemoryError)       the task held more memory than its hard limit
        └── TaskTimeoutError (TimeoutError)       the task took longer than its time limit

Because of the second base classes, ``except`` clauses that were written for :mod:`concurrent.futures` keep
working. Each class passes its fields to ``super().__init__``, so that all these exceptions can be pickled.
"""

import signal
from concurrent.futures.process import BrokenProcessPool

__all__ = [
    "BackendUnavailableError",
    "DeviceError",
    "FedexecError",
    "InitializerError",
    "NodeLostError",
    "PreloadError",
    "SettingsError",
    "TaskTimeoutError",
    "TransferError",
    "UnknownBackendError",
    "UnpickleError",
    "WorkerDiedError",
    "WorkerError",
    "WorkerMemoryError",
]

SIGKILL = 9  # on all systems where a signal can end a process; Windows does not define it


class FedexecError(Exception):
    """Base class of all exceptions of this package."""


class SettingsError(FedexecError, ValueError):
    """A setting is invalid; the message names the setting and the source of its value."""


class UnknownBackendError(SettingsError):
    """There is no backend of this name.

    Parameters
    ----------
    name : str
        The name that was given.
    known : tuple of str
        The names of all backends.
    nearest : str or None
        The known name that is most similar to `name`; None if none is similar.

    Attributes
    ----------
    given_by : str
        Source of the name, such as ``"--backend"`` or ``"FEDEXEC_BACKEND"``; empty if it is not known.
    """

    given_by = ""

    def __init__(self, name: str, known: tuple[str, ...], nearest: str | None) -> None:
        super().__init__(name, known, nearest)
        self.name, self.known, self.nearest = name, known, nearest

    def __str__(self) -> str:
        hint = f" Did you mean {self.nearest!r}?" if self.nearest else ""
        source = f" ({self.given_by})" if self.given_by else ""
        return f"There is no backend {self.name!r}{source}.{hint} Known: {', '.join(self.known)}."


class BackendUnavailableError(FedexecError, ImportError):
    """The backend exists, but cannot run on this system.

    Parameters
    ----------
    name : str
        Name of the backend.
    reason : str
        Why it cannot run.
    install : str or None
        The command that installs what is missing.
    """

    def __init__(self, name: str, reason: str, install: str | None = None) -> None:
        super().__init__(name, reason, install)
        self.backend, self.reason, self.install = name, reason, install

    def __str__(self) -> str:
        hint = f" Install it with: {self.install}" if self.install else ""
        return f"Backend {self.backend!r} is not available: {self.reason}.{hint}"


class PreloadError(FedexecError, BrokenProcessPool):
    """A module of ``preload=`` cannot be imported in a worker.

    Parameters
    ----------
    module : str
        Name of the module.
    traceback : str
        Traceback of the worker, as text.
    """

    def __init__(self, module: str, traceback: str) -> None:
        super().__init__(module, traceback)
        self.module, self.traceback = module, traceback

    def __str__(self) -> str:
        last = self.traceback.strip().rsplit("\n", 1)[-1]
        return f"The preload {self.module!r} cannot be imported in a worker: {last}"


class InitializerError(FedexecError, BrokenProcessPool):
    """The initializer raised in a worker, so no task can run. The ``__cause__`` is its exception.

    Parameters
    ----------
    pid : int
        Process id of the worker.
    error : str
        The initializer's exception, as text.
    """

    def __init__(self, pid: int, error: str) -> None:
        super().__init__(pid, error)
        self.pid, self.error = pid, error

    def __str__(self) -> str:
        return f"The initializer raised in worker {self.pid}: {self.error}"


class TransferError(FedexecError, MemoryError):
    """Arrays do not fit into the memory through which they would have to be sent."""


class DeviceError(FedexecError):
    """A device does not exist or does not answer; the message names the devices that exist."""


class WorkerError(FedexecError):
    """A task failed because of its worker, not because of what it computes.

    Attributes
    ----------
    stderr : str
        The last lines that the task had written to stderr; empty if there were none, or if the system does
        not allow reading them. After a fatal signal they end with Python's report of the signal, after the
        time limit with the stack of each thread.
    node : str
        Name of the node of a cluster on which the task ran; empty if it was this machine.
    """

    stderr = ""
    node = ""

    def quote(self, stderr: str) -> None:
        """Keep lines of stderr, also in a note, so that a traceback shows them.

        Parameters
        ----------
        stderr : str
        """
        if stderr:
            self.stderr = stderr
            self.add_note(f"The last lines that the worker wrote to stderr:\n{stderr}")


def _ending(exitcode: int | None) -> str:
    """Say in words how a process ended."""
    if exitcode is None:
        return "ended in an unknown way"
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = "unknown signal"
    return f"was ended by signal {-exitcode} ({name})"


class WorkerDiedError(WorkerError, BrokenProcessPool):
    """The process that ran a task ended before it gave a result.

    Parameters
    ----------
    pid : int or None
        Process id of the worker; None if the process never started.
    exitcode : int or None
        As in :class:`multiprocessing.Process`: a negative number is a signal; None if it is unknown.
    task : str
        Name of the task.

    Attributes
    ----------
    is_deliberate : bool
        Whether the executor was told to end the worker: by ``kill_workers``, by ``end``, or by Ctrl+C in its
        ``with`` block.
    """

    is_deliberate = False

    def __init__(self, pid: int | None, exitcode: int | None, task: str) -> None:
        super().__init__(pid, exitcode, task)
        self.pid, self.exitcode, self.task = pid, exitcode, task

    @property
    def signal(self) -> int | None:
        """Number of the signal that ended the process; None if no signal did."""
        return -self.exitcode if self.exitcode is not None and self.exitcode < 0 else None

    def __str__(self) -> str:
        who = "The worker" if self.pid is None else f"Worker {self.pid}"
        who += f" on node {self.node}" if self.node else ""
        hint = ""
        if self.is_deliberate:
            hint = " Its executor was told to end it."
        elif self.signal == SIGKILL:
            hint = (
                " If no user killed it, the machine ran out of memory: run fewer tasks at once (max_workers)."
            )
        return f"{who} {_ending(self.exitcode)} while it ran {self.task}.{hint}"


class NodeLostError(WorkerDiedError):
    """The node on which a task ran has ended, or cannot be reached any more.

    Parameters
    ----------
    node : str
        Name of the node's host, and what the engine calls the node.
    reason : str
        What the engine says.
    task : str
        Name of the task.
    """

    def __init__(self, node: str, reason: str, task: str) -> None:
        super().__init__(None, None, task)
        self.args = (node, reason, task)
        self.node, self.reason = node, reason

    def __str__(self) -> str:
        return f"Node {self.node} was lost while it ran {self.task}: {self.reason.rstrip('.')}."


class UnpickleError(WorkerError, BrokenProcessPool):
    """A task, a result or an exception could not be unpickled. The ``__cause__`` is the error of unpickling.

    Parameters
    ----------
    what : {"task", "result", "exception"}
        A task is unpickled in the worker; results and exceptions are unpickled in the caller's process.
    task : str
        Name of the task.
    error : str
        The error of unpickling, as text.
    """

    def __init__(self, what: str, task: str, error: str) -> None:
        super().__init__(what, task, error)
        self.what, self.task, self.error = what, task, error

    def __str__(self) -> str:
        where = "in its worker" if self.what == "task" else "in the caller's process"
        return f"The {self.what} of {self.task} could not be unpickled {where}: {self.error}"


class TaskTimeoutError(WorkerError, TimeoutError):
    """A task took longer than ``timeout=``, so its worker was ended.

    Parameters
    ----------
    task : str
        Name of the task.
    timeout : float
        Time limit in seconds.
    pid : int or None
        Process id of the worker.

    Attributes
    ----------
    is_importing : bool
        Whether the stacks of the worker show that the task was importing a module when it was ended.
    """

    is_importing = False

    def __init__(self, task: str, timeout: float, pid: int | None) -> None:
        super().__init__(task, timeout, pid)
        self.task, self.timeout, self.pid = task, timeout, pid

    def __reduce__(self) -> tuple[type, tuple[str, float, int | None], dict[str, object]]:
        # TimeoutError is an OSError, which would take the three arguments for errno, strerror and filename.
        return type(self), (self.task, self.timeout, self.pid), self.__dict__

    def quote(self, stderr: str) -> None:
        """Keep lines of stderr, which include the stacks that Python writes when it gets SIGTERM.

        Parameters
        ----------
        stderr : str
        """
        super().quote(stderr)
        self.is_importing = '"<frozen importlib._bootstrap>"' in stderr.rpartition("Current thread")[2]

    def __str__(self) -> str:
        advice = "Raise timeout= or FEDEXEC_TIMEOUT if it needs longer."
        if self.is_importing:
            advice = f"It was importing modules then; preload= would have imported them before. {advice}"
        return f"{self.task} was ended after {self.timeout:g} s (worker {self.pid}). {advice}"


class WorkerMemoryError(WorkerError, MemoryError):
    """A running task held more memory than a hard limit, so its worker was ended.

    Parameters
    ----------
    task : str
        Name of the task.
    pid : int or None
        Process id of the worker.
    held, limit : int
        Memory that the worker held, and the limit, in bytes.
    where : str
        "host memory", or the name of a device.
    """

    def __init__(self, task: str, pid: int | None, held: int, limit: int, where: str) -> None:
        super().__init__(task, pid, held, limit, where)
        self.task, self.pid, self.held, self.limit, self.where = task, pid, held, limit, where

    def __str__(self) -> str:
        return (
            f"{self.task} was ended: worker {self.pid} held {self.held >> 20} MiB of {self.where}, "
            f"but its hard limit is {self.limit >> 20} MiB."
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception says that memory ran out, on the host or on a device.

    The name of the class decides, so that torch need not be imported: ``torch.OutOfMemoryError`` is a
    RuntimeError.

    Parameters
    ----------
    error : BaseException or None

    Returns
    -------
    bool
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError", "DeviceMemoryError"})
