"""How a worker runs one task. The caller's side is :mod:`fedexec._channel.task_channel`.

A worker calls :func:`fedexec._worker.setup.setup` once and :func:`run` for each task, whatever backend
started it. Nothing heavy may be imported here: this is the first thing that every worker imports.
"""

import os
import pickle
import sys
import time
import traceback

from fedexec._channel.messages import Delivery, Reply, ReplyKind
from fedexec._channel.pickling import dumps, show_sources
from fedexec._channel.segments import UnreachableSegmentError
from fedexec._channel.stderr import listen, unread
from fedexec._worker import imports, seeding
from fedexec._worker.imports import Imports
from fedexec._worker.meter import TaskMeter, this_worker
from fedexec.devices import device
from fedexec.errors import is_out_of_memory
from fedexec.interface import Usage

__all__ = ["failure", "run"]


def run(message: bytes) -> bytes:
    """Run one task; its value or its exception is in the answer. Only the end of the process stops it."""
    if this_worker.failure is not None:
        return this_worker.failure
    delivery = Delivery(message)
    del message
    new = Imports()
    reply = _run(delivery, new)
    if delivery.learns:
        reply.imported = new.installed()
    reply.kept = not delivery.close()
    reply.unread = unread()
    return pickle.dumps(reply)


def _run(delivery: Delivery, new: Imports) -> Reply:
    if delivery.stderr is not None:
        listen(delivery.stderr)
    with seeding.seeded(delivery.seed), seeding.passed_on(delivery.seed):
        return _run_seeded(delivery, new)


def _run_seeded(delivery: Delivery, new: Imports) -> Reply:
    begun = time.perf_counter()
    try:
        device.assign(delivery.device)  # before anything is unpickled that might start it
        if delivery.sources:
            show_sources(delivery.sources)
        if delivery.path is not None:
            sys.path[:] = delivery.path
            imports.forget_other_versions()
        fn, args, kwargs = delivery.open()
        if delivery.seed is not None:
            seeding.seed_all(delivery.seed)  # again: what was unpickled may have drawn
    except UnreachableSegmentError as exc:
        return Reply(ReplyKind.UNREACHABLE, b"", os.getpid(), str(exc))
    except BaseException as exc:
        return failure(ReplyKind.TASK_UNREADABLE, exc)
    meter = TaskMeter(new, time.perf_counter() - begun)
    try:
        value = fn(*args, **kwargs)
    except BaseException as exc:  # SystemExit too: it is the task's answer, as in concurrent.futures
        return failure(ReplyKind.EXCEPTION, exc, meter.read())
    usage = meter.read()
    try:
        return Reply(ReplyKind.VALUE, delivery.answer(value), os.getpid(), usage=usage)
    except BaseException as exc:
        exc.add_note(f"fedexec: this happened while pickling the result ({type(value).__qualname__})")
        return failure(ReplyKind.EXCEPTION, exc, usage)


def failure(kind: ReplyKind, error: BaseException, usage: Usage | None = None) -> Reply:
    """Make the reply of a task or a set-up that raised; what does not pickle is replaced by the reason."""
    text = "".join(traceback.format_exception(error))
    try:
        packed = dumps(error)
    except BaseException as exc:
        # As in concurrent.futures, what could not be pickled is replaced by the reason why not.
        exc.add_note(f"fedexec: this happened while pickling the exception {error!r}")
        text += "\n" + "".join(traceback.format_exception(exc))
        try:
            packed = dumps(exc)
        except BaseException:
            packed = pickle.dumps(pickle.PicklingError(f"{error!r} could not be pickled: {exc!r}"))
    return Reply(kind, packed, os.getpid(), text, usage, out_of_memory=is_out_of_memory(error))
