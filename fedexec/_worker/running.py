"""Runs one task in a worker. The caller's side is :mod:`fedexec._channel.task_channel`.

A worker calls :func:`fedexec._worker.setup.setup` once and :func:`run` for each task, whatever backend has
started it. Every worker imports this module first, so it must not import anything that takes long.
"""

import os
import pickle
import sys
import time
import traceback

from fedexec._channel.messages import Delivery, Reply, ReplyKind
from fedexec._channel.pickling import dumps, show_sources
from fedexec._channel.segments import UnreachableSegmentError
from fedexec._channel.stderr import listen, redirect_stdout, unread
from fedexec._worker import imports, seeding
from fedexec._worker.imports import Imports
from fedexec._worker.meter import TaskMeter, this_worker
from fedexec._worker.threads import threads_of_task
from fedexec.devices import device
from fedexec.errors import is_out_of_memory
from fedexec.interface import Usage

__all__ = ["failure", "run"]


def run(message: bytes) -> bytes:
    """Run one task. This never raises: the reply carries the value of the task, or its exception.

    Parameters
    ----------
    message : bytes
        As :class:`~fedexec._channel.task_channel.TaskChannel` has packed it.

    Returns
    -------
    bytes
        The pickled :class:`~fedexec._channel.messages.Reply`.
    """
    if this_worker.failure is not None:
        return this_worker.failure
    delivery = Delivery(message)
    del message
    new = Imports()
    reply = _run(delivery, new)
    if delivery.stdout is not None:
        flush_stdout()
    if delivery.learns:
        reply.imported = new.installed()
    reply.kept = not delivery.close()
    reply.unread = unread()
    return pickle.dumps(reply)


def _run(delivery: Delivery, new: Imports) -> Reply:
    if delivery.stderr is not None:
        listen(delivery.stderr)
    if delivery.stdout is not None:
        redirect_stdout(delivery.stdout)
    with seeding.seeded(delivery.seed), seeding.passed_on(delivery.seed):
        return _run_seeded(delivery, new)


def _run_seeded(delivery: Delivery, new: Imports) -> Reply:
    begun = time.perf_counter()
    try:
        device.assign(delivery.device)  # before unpickling, which could start CUDA
        if delivery.sources:
            show_sources(delivery.sources)
        if delivery.path is not None:
            sys.path[:] = delivery.path
            imports.forget_other_versions()
        fn, args, kwargs = delivery.open()
        if delivery.seed is not None:
            seeding.seed_all(delivery.seed)  # once more, because unpickling may have drawn random numbers
    except UnreachableSegmentError as exc:
        return Reply(ReplyKind.UNREACHABLE, b"", os.getpid(), str(exc))
    except BaseException as exc:
        return failure(ReplyKind.TASK_UNREADABLE, exc)
    meter = TaskMeter(new, time.perf_counter() - begun)
    try:
        with threads_of_task(delivery.threads):
            value = fn(*args, **kwargs)
    except BaseException as exc:  # also SystemExit: it is the outcome of the task, as in concurrent.futures
        return failure(ReplyKind.EXCEPTION, exc, meter.read())
    usage = meter.read()
    try:
        return Reply(ReplyKind.VALUE, delivery.answer(value), os.getpid(), usage=usage)
    except BaseException as exc:
        exc.add_note(f"fedexec: this happened while pickling the result ({type(value).__qualname__})")
        return failure(ReplyKind.EXCEPTION, exc, usage)


def flush_stdout() -> None:
    """Write out what the task has printed, because the caller reads no more after the reply."""
    try:
        sys.stdout.flush()
    except (AttributeError, OSError, ValueError):  # the task has closed or replaced it
        pass


def failure(kind: ReplyKind, error: BaseException, usage: Usage | None = None) -> Reply:
    """Make the reply for a task or a set-up that has raised.

    Parameters
    ----------
    kind : ReplyKind
    error : BaseException
        The exception. If it cannot be pickled, the error of pickling replaces it.
    usage : Usage, optional

    Returns
    -------
    Reply
    """
    text = "".join(traceback.format_exception(error))
    try:
        packed = dumps(error)
    except BaseException as exc:
        # As in concurrent.futures, the error of pickling replaces an exception that cannot be pickled.
        exc.add_note(f"fedexec: this happened while pickling the exception {error!r}")
        text += "\n" + "".join(traceback.format_exception(exc))
        try:
            packed = dumps(exc)
        except BaseException:
            packed = pickle.dumps(pickle.PicklingError(f"{error!r} could not be pickled: {exc!r}"))
    return Reply(kind, packed, os.getpid(), text, usage, out_of_memory=is_out_of_memory(error))
