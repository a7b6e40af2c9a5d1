"""The caller's side of the task channel: it packs a task, has the backend send it, and reads the reply.

The worker's side is :mod:`fedexec._worker.running`.
"""

import functools
import logging
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import cloudpickle

from fedexec._channel.changed import Changed
from fedexec._channel.messages import Reply, ReplyKind
from fedexec._channel.packed_calls import PackedCall, PackedReply
from fedexec._channel.pickling import Packed, dump
from fedexec._channel.segment_pool import Parcel, SegmentPool
from fedexec._channel.segments import supported
from fedexec._channel.stderr import Relay
from fedexec._channel.template_learning import Learner
from fedexec.errors import WorkerDiedError
from fedexec.interface import Outcome, Task

__all__ = ["TaskChannel", "pack", "rehearsal"]

# What makes an executor useless, on a node too.
_BREAKS = (ReplyKind.PRELOAD_FAILED, ReplyKind.INITIALIZER_FAILED)

log = logging.getLogger("fedexec")


class TaskChannel:
    """Takes tasks to workers and brings their outcomes back. There is one for each executor.

    Parameters
    ----------
    shared_memory : bool
        Whether large arrays go through shared memory where the system supports it. If not, the message holds
        all data.
    learner : Learner, optional
        Is told what tasks import, if workers are forked from a template that can learn modules.
    """

    def __init__(self, *, shared_memory: bool, learner: Learner | None = None) -> None:
        self._learner = learner
        self._pool = SegmentPool(enabled=shared_memory and supported())
        self._stderr = Relay()
        self._stdout = Relay(1)  # for tasks whose caller is on another machine
        self._path = Changed(lambda: tuple(entry for entry in sys.path if isinstance(entry, str)))

    def deliver(self, task: Task, call: Callable[[bytes], bytes]) -> Outcome:
        """Run a task in a worker.

        Parameters
        ----------
        task : Task
        call : callable
            ``call(message)`` has a worker call :func:`fedexec.backend.run` with the message, and returns the
            reply, as bytes. What it raises, such as WorkerDiedError, is raised here.

        Returns
        -------
        Outcome

        Raises
        ------
        Exception
            Whatever pickling the call raises, with a note that names the argument.
        """
        with (
            self._stderr.line(task) as line,
            self._stdout.line(task) if task.pass_on is not None else nullcontext() as stdout,
            self._pack(task, line.path if line else None, stdout.path if stdout else None) as parcel,
        ):
            try:
                reply: Reply = pickle.loads(call(parcel.message))
            except WorkerDiedError as exc:
                if line is not None:
                    exc.quote(line.tail())
                raise
            finally:
                if stdout is not None:
                    stdout.tail()
            if reply.unread and line is not None:
                line.tail()
            if reply.kind is not ReplyKind.UNREACHABLE:
                if reply.kept:
                    parcel.keep()
                if self._learner is not None:
                    self._learner.note(task, reply.imported, reply.usage)
                return _outcome(reply, parcel, task)
        if self._pool.disable():
            log.warning(
                "workers cannot open the caller's shared memory (%s), so arrays are copied", reply.traceback
            )
        return self.deliver(task, call)

    def learning(self) -> dict[str, Any]:
        """Return what the template has learnt, as the learner reports it."""
        return {} if self._learner is None else self._learner.report()

    def close(self) -> None:
        """Give back the pipes, and the shared memory that no result needs. No worker may be left."""
        if self._learner is not None:
            self._learner.close()
        self._pool.close()
        self._stderr.close()
        self._stdout.close()

    def _pack(self, task: Task, stderr: str | None, stdout: str | None) -> Parcel:
        if isinstance(task.fn, PackedCall):
            packed, path = task.fn.packed, task.fn.path
        else:
            packed, path = pack(task), self._path.value()
        learn = None if self._learner is None else functools.partial(self._learner.prepare, task)
        return self._pool.parcel(
            packed, task.submitted, task.device, stderr, task.seed, path, learn, stdout, task.needs.threads
        )


def pack(task: Task) -> Packed:
    """Pickle the call of a task.

    Parameters
    ----------
    task : Task

    Returns
    -------
    Packed

    Raises
    ------
    Exception
        Whatever pickling raises, with a note that names the argument.
    """
    try:
        return dump((task.fn, task.args, dict(task.kwargs)), with_main=True)
    except BaseException as exc:
        exc.add_note(f"fedexec: this happened while pickling {_culprit(task)} of {task.name}")
        raise


def rehearsal(*, shared_memory: bool) -> bytes:
    """Return a packed task that does nothing, for a template to run as a rehearsal of the tasks to come.

    Parameters
    ----------
    shared_memory : bool
        As for :class:`TaskChannel`.

    Returns
    -------
    bytes
    """
    pool = SegmentPool(enabled=shared_memory and supported())
    with pool.parcel((bool, (), {}), learn=len) as parcel:
        message = parcel.message
    pool.close()
    return message


def _culprit(task: Task) -> str:
    """Name the part of a call that cannot be pickled."""
    parts: list[tuple[str, object]] = [("the function itself", task.fn)]
    parts += [(f"argument {index}", value) for index, value in enumerate(task.args)]
    parts += [(f"argument {name!r}", value) for name, value in task.kwargs.items()]
    for label, value in parts:
        try:
            cloudpickle.dumps(value)
        except BaseException:
            return f"{label} ({type(value).__qualname__})"
    return "the call"


def _outcome(reply: Reply, parcel: Parcel, task: Task) -> Outcome:
    """Turn the reply of a worker into an outcome; this never raises."""
    payload = parcel.open(reply.payload) if reply.kind is ReplyKind.VALUE else Packed(reply.payload, ())
    packed = PackedReply(replace(reply, payload=b""), payload)
    if isinstance(task.fn, PackedCall) and reply.kind not in _BREAKS:
        return Outcome(value=packed, usage=reply.usage, out_of_memory=reply.out_of_memory)
    return packed.outcome(task)
