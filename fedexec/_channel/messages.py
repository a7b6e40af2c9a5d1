"""The messages between the caller and a worker: the message with a task, and the reply of the worker.

A message is bytes, so any channel can carry it: a pipe, a queue, a Manager. If the buffers of an object (of
ndarrays and of torch's CPU tensors) add up to a megabyte or more, they are not part of the message. They lie
in a segment of the caller, which the message names. The worker maps that segment instead of copying from it,
and writes the buffers of its result into a second segment, which the caller then reads without copying.
"""

import enum
import mmap
import pickle
from dataclasses import dataclass
from typing import Any

from fedexec._channel.held_buffers import copy_buffers, lay_out
from fedexec._channel.pickling import Sources, dump
from fedexec._channel.segments import Place, check_room
from fedexec._channel.unpickling import load_with_main
from fedexec.interface import Usage

__all__ = ["THRESHOLD", "Delivery", "Reply", "ReplyKind", "TaskMessage"]

THRESHOLD = 1 << 20  # size of all buffers in bytes from which a segment is worth its system calls


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """A pickled object, and where its buffers are."""

    data: bytes
    buffers: tuple[bytes, ...] = ()  # buffers that are part of the message
    place: Place | None = None  # segment that holds the buffers otherwise
    layout: tuple[tuple[int, int], ...] = ()  # (offset, size) of each buffer in that segment
    answer: Place | None = None  # segment into which the worker may write the buffers of the result
    device: str | None = None  # UUID of the device on which the worker has to compute
    stderr: str | None = None  # path to which the worker has to write its stderr
    stdout: str | None = None  # path to which the worker has to write its stdout; None if it keeps its own
    seed: int | None = None  # seed of the worker's random generators
    threads: int | None = None  # how many the task's libraries may use; None: as many as the worker's
    sources: Sources = ()  # source lines of notebook cells, for tracebacks
    learns: bool = False  # whether the caller wants to know what the task imports
    path: tuple[str, ...] | None = None  # the caller's sys.path, if it changed after workers were started


class Delivery:
    """A message of :meth:`SegmentPool.parcel` as it arrives in the worker.

    Parameters
    ----------
    data : bytes
        The message.
    """

    def __init__(self, data: bytes) -> None:
        self._message: TaskMessage = pickle.loads(data)
        self._memory: mmap.mmap | None = None

    @property
    def device(self) -> str | None:
        """UUID of the device on which to compute; it is known before anything is unpickled."""
        return self._message.device

    @property
    def stderr(self) -> str | None:
        """Path to which to write stderr; see :mod:`fedexec._channel.stderr`."""
        return self._message.stderr

    @property
    def stdout(self) -> str | None:
        """Path to which to write stdout; None if it stays as it is."""
        return self._message.stdout

    @property
    def seed(self) -> int | None:
        """Seed of the task's random generators; None for independent random numbers."""
        return self._message.seed

    @property
    def threads(self) -> int | None:
        """How many threads the task's libraries may use; None: as many as the worker's."""
        return self._message.threads

    @property
    def path(self) -> tuple[str, ...] | None:
        """The caller's ``sys.path``; None if it has not changed since workers were started."""
        return self._message.path

    @property
    def learns(self) -> bool:
        """Whether the caller wants to know what the task imports."""
        return self._message.learns

    @property
    def sources(self) -> Sources:
        """Source lines of notebook cells, for tracebacks."""
        return self._message.sources

    def open(self) -> Any:
        """Unpickle the object.

        Arrays are views of the segment. If the task writes to an array, the kernel copies the page that is
        written to, so the caller never sees the change.

        Returns
        -------
        object

        Raises
        ------
        UnreachableSegmentError
            This process cannot open the segment.
        """
        message = self._message
        if message.place is None:
            return load_with_main(message.data, map(bytearray, message.buffers), is_task=True)
        end = max(offset + size for offset, size in message.layout)
        self._memory, start = message.place.open(end, write=False)
        with memoryview(self._memory) as memory:
            views = [memory[start + offset : start + offset + size] for offset, size in message.layout]
        return load_with_main(message.data, views, is_task=True)

    def answer(self, obj: object) -> bytes:
        """Pack a result for :meth:`Parcel.open`.

        Parameters
        ----------
        obj : object

        Returns
        -------
        bytes

        Raises
        ------
        TransferError
            There is not enough memory for the buffers of the result.
        """
        data, buffers, _ = dump(obj)
        layout, size = lay_out(buffers)
        place = self._message.answer
        if size >= THRESHOLD:
            check_room(size)
        if place is None or size < THRESHOLD:
            return pickle.dumps(TaskMessage(data, tuple(map(bytes, buffers))))
        memory, start = place.open(size, write=True)
        copy_buffers(memory, layout, buffers, start)
        memory.close()
        return pickle.dumps(TaskMessage(data, place=place, layout=layout))

    def close(self) -> bool:
        """Unmap the segment.

        Returns
        -------
        bool
            False if the task still has views of the segment, so that nobody may write to it again.
        """
        try:
            if self._memory is not None:
                self._memory.close()
        except BufferError:
            return False
        return True


class ReplyKind(enum.Enum):
    """What the payload of a reply is."""

    VALUE = enum.auto()
    EXCEPTION = enum.auto()
    TASK_UNREADABLE = enum.auto()
    INITIALIZER_FAILED = enum.auto()
    PRELOAD_FAILED = enum.auto()
    UNREACHABLE = enum.auto()


@dataclass(slots=True)
class Reply:
    """The reply of a worker.

    Attributes
    ----------
    kind : ReplyKind
    payload : bytes
        A packed value, or a pickled exception.
    pid : int
        Process id of the worker.
    traceback : str
        Traceback of the exception as text; empty if there was no exception.
    usage : Usage or None
        Usage of the task, if it ran.
    kept : bool
        Whether the task still has views of the segment that it was sent.
    imported : tuple of str
        Modules of installed packages that the task has imported, if the caller wants to know.
    unread : bool
        Whether the task has written to stderr what the caller may not have read yet.
    out_of_memory : bool
        Whether the exception says that memory ran out, on the host or on a device.
    """

    kind: ReplyKind
    payload: bytes
    pid: int
    traceback: str = ""
    usage: Usage | None = None
    kept: bool = False
    imported: tuple[str, ...] = ()
    unread: bool = False
    out_of_memory: bool = False
