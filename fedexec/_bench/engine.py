"""Flower's own simulation engine as a contestant: its actors get tasks as the messages of a ClientApp."""

import concurrent.futures
import contextlib
import functools
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any, cast

import cloudpickle
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedexec._bench import tasks
from fedexec.flower.flower_internals import (
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    become_server,
    ray_backend,
    stamp,
)

__all__ = ["engine"]

RUN_ID = 1


@contextlib.contextmanager
def engine(preload: tuple[str, ...], workers: int, threads: int) -> Iterator[Callable[..., Any]]:
    """Start Flower's pool of Ray actors; yield what sends one a task, as its simulation sends a message."""
    become_server(RUN_ID)
    quiet = {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False}
    backend = ray_backend(
        {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": quiet | {"configure_logging": False},
        }
    )
    backend.build(functools.partial(task_app, preload, threads))
    partitions = itertools.cycle(range(workers))

    def run(fn: Callable[..., Any], *args: Any) -> Any:
        message = Message(_pack((fn, args)), 1, "train")
        stamp(message)
        partition: dict[str, Any] = {PARTITION_ID_KEY: next(partitions), NUM_PARTITIONS_KEY: workers}
        reply, _ = backend.process_message(message, Context(RUN_ID, 1, partition, RecordDict(), {}))
        return _unpack(reply)

    try:
        with concurrent.futures.ThreadPoolExecutor(workers) as messages:
            yield lambda fn, *args: messages.submit(run, fn, *args)
    finally:
        backend.terminate()


def task_app(preload: tuple[str, ...], threads: int) -> ClientApp:
    """Return an app that runs the task in a message; called in an actor, for each message."""
    tasks.prepare(preload, None, threads)
    app = ClientApp()

    @app.train()
    def run(message: Message, context: Context) -> Message:
        fn, args = _unpack(message)
        return Message(_pack(fn(*args)), reply_to=message)

    return app


def _pack(obj: Any) -> RecordDict:
    return RecordDict({"task": ConfigRecord({"pickle": cloudpickle.dumps(obj)})})


def _unpack(message: Message) -> Any:
    return pickle.loads(cast("bytes", message.content["task"]["pickle"]))
