"""Calls that another process has pickled, and their results: what a node passes on without unpickling it.

A task of a cluster is pickled once, by the caller, and unpickled once, in its worker. The node between them
knows only its name, and the buffers, which it passes on through shared memory.
"""

import pickle
from concurrent.futures.process import _RemoteTraceback as RemoteTraceback
from dataclasses import dataclass
from typing import Any, NoReturn

from fedexec._channel.messages import Reply, ReplyKind
from fedexec._channel.pickling import Packed
from fedexec._channel.unpickling import loads
from fedexec.errors import InitializerError, PreloadError, UnpickleError
from fedexec.interface import Outcome, Task, Usage

__all__ = ["PackedCall", "PackedReply"]


class PackedCall:
    """A call that another process has pickled: the function of a task on a node.

    Parameters
    ----------
    packed : Packed
        The pickled ``(fn, args, kwargs)``.
    kind : str
        Module and name of the function, for messages and measurements.
    path : tuple of str or None
        The ``sys.path`` with which the worker has to find modules, if it differs from the node's.
    """

    def __init__(self, packed: Packed, kind: str, path: tuple[str, ...] | None = None) -> None:
        self.packed = packed
        self.path = path
        module, _, name = kind.rpartition(".")
        self.__module__, self.__qualname__ = module, name

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse to run in this process: only a worker unpickles the call."""
        raise TypeError(f"{self.__module__}.{self.__qualname__} was pickled for a worker")


@dataclass(slots=True)
class PackedReply:
    """The reply of a worker, whose value or exception is still pickled.

    Attributes
    ----------
    kind : ReplyKind
    payload : Packed
        The value or the exception.
    pid : int
        Process id of the worker.
    traceback : str
        Traceback of the exception as text; empty if there was no exception.
    usage : Usage or None
    out_of_memory : bool
    """

    kind: ReplyKind
    payload: Packed
    pid: int
    traceback: str
    usage: Usage | None
    out_of_memory: bool

    @classmethod
    def of(cls, reply: Reply, payload: Packed) -> "PackedReply":
        """Join a reply and its payload.

        Parameters
        ----------
        reply : Reply
        payload : Packed

        Returns
        -------
        PackedReply
        """
        return cls(reply.kind, payload, reply.pid, reply.traceback, reply.usage, reply.out_of_memory)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The buffers stay beside the pickle that an engine makes, so that they are not copied into it.
        make = pickle.PickleBuffer if protocol >= 5 else bytes
        buffers = [make(each) for each in self.payload.buffers]
        return _packed_reply, (
            self.kind,
            self.payload.data,
            buffers,
            self.pid,
            self.traceback,
            self.usage,
            self.out_of_memory,
        )

    def outcome(self, task: Task) -> Outcome:
        """Unpickle the value or the exception; this never raises.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Outcome
        """
        if self.kind is ReplyKind.PRELOAD_FAILED:
            module, text = pickle.loads(self.payload.data)
            return Outcome(exception=PreloadError(module, text))
        try:
            value = loads(self.payload.data, map(_writable, self.payload.buffers))
        except BaseException as exc:  # also SystemExit in __setstate__: the thread has other futures to serve
            error = UnpickleError(
                "result" if self.kind is ReplyKind.VALUE else "exception", task.name, repr(exc)
            )
            if self.traceback:
                error.add_note(f"What happened in the worker:\n{self.traceback}")
            error.__cause__ = exc
            return Outcome(exception=error, usage=self.usage)
        if self.kind is ReplyKind.VALUE:
            return Outcome(value=value, usage=self.usage)
        value.__cause__ = RemoteTraceback(f'\n"""\n{self.traceback}"""')  # type: ignore[arg-type]  # takes text
        wrapper: Exception
        if self.kind is ReplyKind.TASK_UNREADABLE:
            wrapper = UnpickleError("task", task.name, repr(value))
        elif self.kind is ReplyKind.INITIALIZER_FAILED:
            wrapper = InitializerError(self.pid, repr(value))
        else:
            return Outcome(exception=value, usage=self.usage, out_of_memory=self.out_of_memory)
        wrapper.__cause__ = value
        return Outcome(exception=wrapper)


def _packed_reply(kind: ReplyKind, data: bytes, buffers: list[Any], *rest: Any) -> PackedReply:
    return PackedReply(kind, Packed(data, [memoryview(each).cast("B") for each in buffers]), *rest)


def _writable(buffer: memoryview) -> memoryview:
    """Return a buffer to which the caller may write; an engine may have put it into read-only memory."""
    return memoryview(bytearray(buffer)) if buffer.readonly else buffer
