"""Calls that another process has pickled, and their results: what a node passes on without unpickling it.

A task of a cluster is pickled once, by the caller, and unpickled once, in its worker. The node between them
knows only its name, and the buffers, which it passes on through shared memory.
"""

import pickle
from concurrent.futures.process import _RemoteTraceback as RemoteTraceback
from dataclasses import dataclass
from typing import NoReturn

from fedexec._channel.messages import Reply, ReplyKind
from fedexec._channel.pickling import Packed
from fedexec._channel.unpickling import loads
from fedexec.errors import InitializerError, PreloadError, UnpickleError
from fedexec.interface import Outcome, Task

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
    reply : Reply
        Without its payload.
    payload : Packed
        The value or the exception.
    """

    reply: Reply
    payload: Packed

    def outcome(self, task: Task) -> Outcome:
        """Unpickle the value or the exception; this never raises.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Outcome
        """
        reply = self.reply
        if reply.kind is ReplyKind.PRELOAD_FAILED:
            module, text = pickle.loads(self.payload.data)
            return Outcome(exception=PreloadError(module, text))
        try:
            value = loads(self.payload.data, map(_writable, self.payload.buffers))
        except BaseException as exc:  # also SystemExit in __setstate__: the thread has other futures to serve
            error = UnpickleError(
                "result" if reply.kind is ReplyKind.VALUE else "exception", task.name, repr(exc)
            )
            if reply.traceback:
                error.add_note(f"What happened in the worker:\n{reply.traceback}")
            error.__cause__ = exc
            return Outcome(exception=error, usage=reply.usage)
        if reply.kind is ReplyKind.VALUE:
            return Outcome(value=value, usage=reply.usage)
        value.__cause__ = RemoteTraceback(f'\n"""\n{reply.traceback}"""')  # type: ignore[arg-type]  # takes text
        wrapper: Exception
        if reply.kind is ReplyKind.TASK_UNREADABLE:
            wrapper = UnpickleError("task", task.name, repr(value))
        elif reply.kind is ReplyKind.INITIALIZER_FAILED:
            wrapper = InitializerError(reply.pid, repr(value))
        else:
            return Outcome(exception=value, usage=reply.usage, out_of_memory=reply.out_of_memory)
        wrapper.__cause__ = value
        return Outcome(exception=wrapper)


def _writable(buffer: memoryview) -> memoryview:
    """Return a buffer to which the caller may write; an engine may have put it into read-only memory."""
    return memoryview(bytearray(buffer)) if buffer.readonly else buffer
