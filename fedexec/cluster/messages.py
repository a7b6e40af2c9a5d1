"""What the caller and a node agent say to each other."""

import contextlib
import multiprocessing
import os
import site
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedexec._channel.initargs import PackedHook
from fedexec._channel.packed_calls import PackedReply
from fedexec._channel.pickling import Sources, dumps
from fedexec._channel.unpickling import loads
from fedexec._processes.preparation_data import sys_path
from fedexec._scheduling.admission import Footprint
from fedexec._worker.threads import THREAD_VARIABLES
from fedexec.interface import Needs
from fedexec.settings import PREFIX

__all__ = [
    "NodeOrder",
    "NodeReply",
    "NodeStatus",
    "NodeTask",
    "StaleAgentError",
    "Surroundings",
    "own_path",
    "pack_error",
    "unpack_error",
]


class StaleAgentError(Exception):
    """A node agent does not know the caller: it was restarted, or has given the caller up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What workers take over from the caller's process, as far as their machine has it.

    Attributes
    ----------
    path : tuple of str
        Directories of ``sys.path`` that belong neither to Python nor to installed packages.
    directory : str or None
        The working directory; None if it was removed.
    argv : tuple of str
        ``sys.argv``.
    environ : mapping of str to str
        The environment variables that limit the threads of libraries, and the settings of executors that
        tasks make. The others belong to the machine.
    start_method : str or None
        How processes start that a task starts with :mod:`multiprocessing`; None for the default.
    """

    path: tuple[str, ...]
    directory: str | None
    argv: tuple[str, ...]
    environ: Mapping[str, str]
    start_method: str | None

    @classmethod
    def of_this_process(cls) -> "Surroundings":
        """Return the surroundings of this process."""
        try:
            directory: str | None = str(Path.cwd())
        except OSError:
            directory = None
        return cls(
            path=own_path(),
            directory=directory,
            argv=tuple(sys.argv),
            environ={name: value for name, value in os.environ.items() if _is_taken_over(name)},
            start_method=multiprocessing.get_start_method(allow_none=True),
        )

    def take_over(self) -> tuple[str, ...]:
        """Give them to this process, as far as this machine has them.

        Returns
        -------
        tuple of str
            The part of ``sys.path`` that was here before.
        """
        own = tuple(entry for entry in self.path if os.path.exists(entry))  # noqa: PTH110
        base = tuple(entry for entry in sys.path if entry not in own)
        sys.path[:] = [*own, *base]
        sys.argv[:] = self.argv
        for name in THREAD_VARIABLES + tuple(name for name in os.environ if name.startswith(PREFIX)):
            os.environ.pop(name, None)  # an engine may have set them for its own processes
        os.environ.update(self.environ)
        if self.start_method is not None:
            multiprocessing.set_start_method(self.start_method, force=True)
        if self.directory is not None:
            with contextlib.suppress(OSError):
                os.chdir(self.directory)
        return base


def pack_error(error: BaseException) -> bytes:
    """Pickle an exception with its cause, which pickle alone would leave out.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    bytes
    """
    return dumps((error, error.__cause__))


def unpack_error(data: bytes) -> BaseException:
    """Unpickle what :func:`pack_error` has pickled.

    Parameters
    ----------
    data : bytes

    Returns
    -------
    BaseException
    """
    error: BaseException
    error, error.__cause__ = loads(data)
    return error


def _is_taken_over(name: str) -> bool:
    where = ("BACKEND", "NODE_", "RAY_", "DASK_")  # where the caller's tasks run, not those of its tasks
    if name.startswith(PREFIX):
        return not name.removeprefix(PREFIX).startswith(where)
    return name in THREAD_VARIABLES


def own_path() -> tuple[str, ...]:
    """Return the directories of ``sys.path`` that belong neither to Python nor to installed packages."""
    installed = tuple({sys.prefix, sys.base_prefix, sys.exec_prefix, site.getusersitepackages()})
    entries = sys_path()
    return tuple(entry for entry in entries if not entry.startswith(installed) and "-packages" not in entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeOrder:
    """What a node agent needs to make its executor.

    Attributes
    ----------
    settings : mapping of str to object
        Settings of the executor, as for :func:`fedexec.create_executor`.
    initializer, warmup : PackedHook or None
        The pickled functions without parameters.
    surroundings : Surroundings
    log_level : int
        Level of the caller's logger.
    lease_seconds : float
        How long after the last sign of life of the caller the node agent ends its workers.
    """

    settings: Mapping[str, Any]
    initializer: PackedHook | None
    warmup: PackedHook | None
    surroundings: Surroundings
    log_level: int
    lease_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeTask:
    """A task for a node.

    Attributes
    ----------
    id : int
        Number of the task in the caller.
    data : bytes
        The pickled call.
    buffers : tuple
        Its buffers: the bytes, or ``(number, offset, size)`` of a part of a content.
    sources : Sources
        Source lines of notebook cells, for tracebacks.
    path : tuple of str or None
        Directories of ``sys.path`` that are the caller's own, if they have changed since the order.
    kind, tag, timeout, seed, needs
        As those of :class:`~fedexec.interface.Task`.
    """

    id: int
    data: bytes
    buffers: tuple[bytes | tuple[int, int, int], ...]
    sources: Sources
    path: tuple[str, ...] | None
    kind: str
    tag: str | None
    timeout: float | None
    seed: int | None
    needs: Needs


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """How a node is.

    Attributes
    ----------
    slots : int
        How many tasks the node can run at once now.
    pids : mapping of int to int
        Task id -> process id of its worker.
    output : tuple of (int, bytes)
        What tasks have written to stdout (1) and stderr (2) since the last status.
    records : tuple of (int, str)
        Level and text of what the executor has logged since the last status.
    restarts, learning, footprints
        As :class:`fedexec.Stats` and :meth:`fedexec.Executor.footprints` show them.
    """

    slots: int
    pids: Mapping[int, int] = field(default_factory=dict)
    output: tuple[tuple[int, bytes], ...] = ()
    records: tuple[tuple[int, str], ...] = ()
    restarts: Mapping[str, int] = field(default_factory=dict)
    learning: Mapping[str, Any] = field(default_factory=dict)
    footprints: Mapping[str, Footprint] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReply:
    """How a task has ended on a node.

    Attributes
    ----------
    reply : PackedReply or None
        What its worker has replied.
    error : bytes or None
        The pickled exception if there was no reply, such as WorkerDiedError.
    status : NodeStatus
    """

    reply: PackedReply | None
    error: bytes | None
    status: NodeStatus
