"""What is sent: the message that takes a task to a worker, and the reply that a worker gives.

A message is bytes that any channel can carry, a pipe, a queue, a Manager. Where an object's buffers (of
ndarrays, of torch's CPU tensors) add up to a megabyte or more, they do not stand in it: they lie in a segment
of the caller's, which the message names. The worker maps that segment instead of reading it, and writes its
result's buffers into a second one, which the caller then looks at without copying.
"""

import enum
import mmap
import pickle
from dataclasses import dataclass
from typing import Any

from fedexec._channel.pickling import Sources, dump, load_with_main
from fedexec._channel.segments import Place, check_room, copy_buffers, lay_out
from fedexec.interface import Usage

__all__ = ["THRESHOLD", "Delivery", "Reply", "ReplyKind", "TaskMessage"]

THRESHOLD = 1 << 20  # bytes of buffers from which a segment is worth its system calls


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """A pickled object, and where its buffers are."""

    data: bytes
    buffers: tuple[bytes, ...] = ()  # those that travel along
    place: Place | None = None  # of those that do not,
    layout: tuple[tuple[int, int], ...] = ()  # at these (offset, size)
    answer: Place | None = None  # where the result's buffers may go
    device: str | None = None  # that the worker is to compute on
    stderr: str | None = None  # where it is to write that
    seed: int | None = None  # of the random numbers that it is to draw
    sources: Sources = ()  # of notebook cells, for tracebacks
    learns: bool = False  # whether the caller wants to know what is imported
    path: tuple[str, ...] | None = None  # its sys.path, if that is another than at its start


class Delivery:
    """What :meth:`SegmentPool.parcel` packed, as it arrives in the worker.

    Parameters
    ----------
    data : bytes
    """

    def __init__(self, data: bytes) -> None:
        self._message: TaskMessage = pickle.loads(data)
        self._memory: mmap.mmap | None = None

    @property
    def device(self) -> str | None:
        """UUID of the device to compute on, known before anything is unpickled."""
        return self._message.device

    @property
    def stderr(self) -> str | None:
        """Where to write stderr; see :mod:`fedexec._channel.stderr`."""
        return self._message.stderr

    @property
    def seed(self) -> int | None:
        """What its random numbers follow from."""
        return self._message.seed

    @property
    def path(self) -> tuple[str, ...] | None:
        """The caller's ``sys.path``; None where it is what it was when the worker was started."""
        return self._message.path

    @property
    def learns(self) -> bool:
        """Whether the caller wants to know what the task imports."""
        return self._message.learns

    @property
    def sources(self) -> Sources:
        """Lines of notebook cells."""
        return self._message.sources

    def open(self) -> Any:
        """Unpickle the object.

        Arrays are views of the segment: writing to one copies the page written to; the caller never sees it.

        Raises
        ------
        UnreachableSegmentError
            The segment cannot be opened from here.
        """
        message = self._message
        if message.place is None:
            return load_with_main(message.data, map(bytearray, message.buffers))
        end = max(offset + size for offset, size in message.layout)
        self._memory, start = message.place.open(end, write=False)
        with memoryview(self._memory) as memory:
            views = [memory[start + offset : start + offset + size] for offset, size in message.layout]
        return load_with_main(message.data, views)

    def answer(self, obj: Any) -> bytes:
        """Pack a result for :meth:`Parcel.open`.

        Raises
        ------
        TransferError
            There is not enough memory for its buffers.
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
        """Unmap the segment. False if somebody still looks at it, so that it must not be written to again."""
        try:
            if self._memory is not None:
                self._memory.close()
        except BufferError:
            return False
        return True


class ReplyKind(enum.Enum):
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
    kind : ReplyKind
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

    kind: ReplyKind
    payload: bytes
    pid: int
    traceback: str = ""
    usage: Usage | None = None
    kept: bool = False
    imported: tuple[str, ...] = ()
    unread: bool = False
    out_of_memory: bool = False
