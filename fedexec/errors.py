"""Every exception fedexec raises by itself; what a task raises arrives unchanged.

::

    FedexecError
    ├── SettingsError (ValueError)                a setting that makes no sense
    │   └── UnknownBackendError                   no backend of that name
    ├── BackendUnavailableError (ImportError)     the backend's package is not installed
    ├── PreloadError (BrokenProcessPool)          a module to preload cannot be imported
    ├── InitializerError (BrokenProcessPool)      the initializer raised
    ├── TransferError (MemoryError)               arrays too large to be sent
    ├── DeviceError                               a device that does not exist, or does not answer
    └── WorkerError                               one task failed because of its worker
        ├── WorkerDiedError (BrokenProcessPool)   the process ended under the task
        ├── UnpickleError (BrokenProcessPool)     a task, result or exception cannot be unpickled
        ├── WorkerMemoryError (MemoryError)       the task held more than its hard limit
        └── TaskTimeoutError (TimeoutError)       the task outlived its deadline

The second bases let ``except`` clauses written for :mod:`concurrent.futures` keep working. Fields are
passed to ``super().__init__``, so that every one of these pickles.
"""

import signal
from concurrent.futures.process import BrokenProcessPool

__all__ = [
    "BackendUnavailableError",
    "DeviceError",
    "FedexecError",
    "InitializerError",
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

SIGKILL = 9  # wherever signals end a process; on Windows the module has no such name


class FedexecError(Exception):
    """Base of every exception of this package."""


class SettingsError(FedexecError, ValueError):
    """A setting that makes no sense; the message says which, and who gave it."""


class UnknownBackendError(SettingsError):
    """No backend has this name.

    Parameters
    ----------
    name : str
    known : tuple of str
        The names that exist.
    nearest : str or None
        The known name that looks most like `name`.

    Attributes
    ----------
    given_by : str
        What has named it, such as ``"--backend"`` or ``"FEDEXEC_BACKEND"``; empty if that is not known.
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
    """The backend exists, but cannot run here.

    Parameters
    ----------
    name : str
    reason : str
    install : str or None
        The command that mends it.
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
    traceback : str
        The worker's traceback, as text.
    """

    def __init__(self, module: str, traceback: str) -> None:
        super().__init__(module, traceback)
        self.module, self.traceback = module, traceback

    def __str__(self) -> str:
        last = self.traceback.strip().rsplit("\n", 1)[-1]
        return f"The preload {self.module!r} cannot be imported in a worker: {last}"


class InitializerError(FedexecError, BrokenProcessPool):
    """The initializer raised in a worker, so no task can run; its exception is the ``__cause__``.

    Parameters
    ----------
    pid : int
        The worker it raised in.
    error : str
        Its exception, as text.
    """

    def __init__(self, pid: int, error: str) -> None:
        super().__init__(pid, error)
        self.pid, self.error = pid, error

    def __str__(self) -> str:
        return f"The initializer raised in worker {self.pid}: {self.error}"


class TransferError(FedexecError, MemoryError):
    """Arrays that do not fit into the memory they would have to be sent through."""


class DeviceError(FedexecError):
    """A device that does not exist or does not answer; the message says which do."""


class WorkerError(FedexecError):
    """A task failed because of its worker, not because of what it computes.

    Attributes
    ----------
    stderr : str
        The last lines that the task had written there; empty where there were none, or nobody listened.
        After a fatal signal they end with Python's report of it, after a deadline with each thread's stack.
    """

    stderr = ""

    def quote(self, stderr: str) -> None:
        """Keep these lines of stderr, also in a note, so that a traceback shows them."""
        if stderr:
            self.stderr = stderr
            self.add_note(f"The last it wrote to stderr:\n{stderr}")


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
        None when the process never started.
    exitcode : int or None
        As in :class:`multiprocessing.Process`: negative is a signal; None is unknown.
    task : str
        The function that ran.

    Attributes
    ----------
    is_deliberate : bool
        The executor was told to end it: by ``kill_workers``, ``end``, or Ctrl+C in its ``with`` block.
    """

    is_deliberate = False

    def __init__(self, pid: int | None, exitcode: int | None, task: str) -> None:
        super().__init__(pid, exitcode, task)
        self.pid, self.exitcode, self.task = pid, exitcode, task

    @property
    def signal(self) -> int | None:
        """Number of the signal that ended the process, None if none did."""
        return -self.exitcode if self.exitcode is not None and self.exitcode < 0 else None

    def __str__(self) -> str:
        who = "The worker" if self.pid is None else f"Worker {self.pid}"
        hint = ""
        if self.is_deliberate:
            hint = " Its executor was told to end it."
        elif self.signal == SIGKILL:
            hint = " If nobody killed it, the machine ran out of memory: run fewer at once (max_workers)."
        return f"{who} {_ending(self.exitcode)} while it ran {self.task}.{hint}"


class UnpickleError(WorkerError, BrokenProcessPool):
    """Something that crossed between processes could not be unpickled; the real error is the ``__cause__``.

    Parameters
    ----------
    what : {"task", "result", "exception"}
        A task is unpickled in the worker, the other two in the caller's process.
    task : str
        The function that ran or should have run.
    error : str
        The real error, as text.
    """

    def __init__(self, what: str, task: str, error: str) -> None:
        super().__init__(what, task, error)
        self.what, self.task, self.error = what, task, error

    def __str__(self) -> str:
        where = "in its worker" if self.what == "task" else "in the caller's process"
        return f"The {self.what} of {self.task} could not be unpickled {where}: {self.error}"


class TaskTimeoutError(WorkerError, TimeoutError):
    """A task ran longer than ``timeout=`` and its worker was ended.

    Parameters
    ----------
    task : str
    timeout : float
        Seconds.
    pid : int or None
        The worker that was ended.

    Attributes
    ----------
    is_importing : bool
        It was importing a module when it was ended, as far as its stacks tell.
    """

    is_importing = False

    def __init__(self, task: str, timeout: float, pid: int | None) -> None:
        super().__init__(task, timeout, pid)
        self.task, self.timeout, self.pid = task, timeout, pid

    def __reduce__(self) -> tuple[type, tuple[str, float, int | None], dict[str, object]]:
        # TimeoutError is an OSError, which takes three arguments for errno, strerror and filename.
        return type(self), (self.task, self.timeout, self.pid), self.__dict__

    def quote(self, stderr: str) -> None:
        """Keep these lines of stderr, with the stacks that a deadline's SIGTERM has Python write."""
        super().quote(stderr)
        self.is_importing = '"<frozen importlib._bootstrap>"' in stderr.rpartition("Current thread")[2]

    def __str__(self) -> str:
        advice = "Raise timeout= or FEDEXEC_TIMEOUT if it needs longer."
        if self.is_importing:
            advice = f"It was importing modules then, which preload= would have done before. {advice}"
        return f"{self.task} was ended after {self.timeout:g} s (worker {self.pid}). {advice}"


class WorkerMemoryError(WorkerError, MemoryError):
    """A running task held more than a hard limit and its worker was ended.

    Parameters
    ----------
    task : str
    pid : int or None
        The worker that was ended.
    held, limit : int
        Bytes.
    where : str
        "host memory", or the name of a device.
    """

    def __init__(self, task: str, pid: int | None, held: int, limit: int, where: str) -> None:
        super().__init__(task, pid, held, limit, where)
        self.task, self.pid, self.held, self.limit, self.where = task, pid, held, limit, where

    def __str__(self) -> str:
        return (
            f"{self.task} was ended: worker {self.pid} held {self.held >> 20} MiB of {self.where}, "
            f"its hard limit is {self.limit >> 20} MiB."
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return whether an exception says that memory ran out, on the host or on a device.

    Told by name, so that nobody has to import torch for it: ``torch.OutOfMemoryError`` is a RuntimeError.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError", "DeviceMemoryError"})
