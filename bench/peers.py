"""Who takes part: every backend of fedexec, and what else a person could use.

A contestant is a context manager that gives a :class:`Caller`. All of them run tasks in processes that have
torch and the training code imported and, but for the tutorial's and Ray's, their share of the cores; warm
loky has been warmed up like our template.
"""

import concurrent.futures
import contextlib
import functools
import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks

import fedexec
from fedexec.settings import available_cores
from fedexec.workload import jobs
from fedexec.workload.data import DataSpec

__all__ = ["CONTESTANTS", "Caller", "contestant"]

PRELOAD = [*jobs.PRELOAD, "tasks"]


@dataclass
class Caller:
    """How a contestant runs tasks.

    Attributes
    ----------
    call : callable
        ``call(fn, *args)`` runs one task and waits for its result.
    submit : callable
        ``submit(fn, *args)`` returns something with a ``result()``.
    """

    call: Callable[..., Any]
    submit: Callable[..., Any]


def _threads(workers: int) -> int:
    return max(1, available_cores() // workers)


@contextlib.contextmanager
def _ours(name: str, workers: int) -> Iterator[Caller]:
    warmup = functools.partial(jobs.warm_up, DataSpec())
    with fedexec.create_executor(name, max_workers=workers, preload=PRELOAD, warmup=warmup) as executor:
        yield Caller(lambda fn, *args: executor.submit(fn, *args).result(), executor.submit)


@contextlib.contextmanager
def _tutorial(workers: int) -> Iterator[Caller]:
    import tutorial

    with concurrent.futures.ThreadPoolExecutor(workers) as clients:  # the tutorial: a process each
        yield Caller(tutorial.call, functools.partial(clients.submit, tutorial.call))


@contextlib.contextmanager
def _pool(method: str, workers: int) -> Iterator[Caller]:
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOAD)
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=context,
        max_tasks_per_child=1,
        initializer=tasks.limit_threads,
        initargs=(_threads(workers),),
    ) as pool:
        yield Caller(lambda fn, *args: pool.submit(fn, *args).result(), pool.submit)


@contextlib.contextmanager
def _loky(workers: int) -> Iterator[Caller]:
    import loky

    pool = loky.ProcessPoolExecutor(workers, initializer=tasks.warm_up, initargs=(_threads(workers),))
    try:
        yield Caller(lambda fn, *args: pool.submit(fn, *args).result(), pool.submit)
    finally:
        pool.shutdown()


@contextlib.contextmanager
def _ray(max_calls: int, workers: int) -> Iterator[Caller]:
    import ray

    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": {"PYTHONPATH": path}},
    )  # fmt: skip

    @ray.remote(num_cpus=1, max_calls=max_calls)
    def remote(fn: Callable[..., Any], *args: Any) -> Any:
        tasks.import_torch()
        return fn(*args)

    @dataclass
    class Answer:
        reference: Any

        def result(self) -> Any:
            return ray.get(self.reference)

    def submit(fn: Callable[..., Any], *args: Any) -> Answer:
        return Answer(remote.remote(fn, *args))

    try:
        yield Caller(lambda fn, *args: submit(fn, *args).result(), submit)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _fork(workers: int) -> Iterator[Caller]:
    """A process with the same imports that forks, has the child end at once, and waits for it."""
    code = (
        "import os, sys\n"
        f"sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n"
        "from fedexec.workload import jobs; from fedexec.workload.data import DataSpec\n"
        "jobs.warm_up(DataSpec())\n"
        "while sys.stdin.buffer.read(1):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        "    os.write(1, b'.')\n"
    )
    limits = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=os.environ | limits,
    )

    def call(fn: Callable[..., Any]) -> None:
        process.stdin.write(b".")
        process.stdout.read(1)

    class Done:
        def result(self) -> None:
            """It has been waited for."""

    def submit(fn: Callable[..., Any]) -> Done:
        call(fn)
        return Done()

    try:
        yield Caller(call, submit)
    finally:
        process.stdin.close()
        process.wait()


def _has(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) for package in packages)


CONTESTANTS: dict[str, Callable[[int], contextlib.AbstractContextManager[Caller]]] = {
    **{info.name: functools.partial(_ours, info.name) for info in fedexec.backends() if info.available},
    **({"tutorial": _tutorial} if _has("flwr", "torchvision") else {}),
    "ppe-spawn": functools.partial(_pool, "spawn"),
    "ppe-forkserver": functools.partial(_pool, "forkserver"),
    **({"plain-loky": _loky} if _has("loky") else {}),
    **(
        {"ray-fresh": functools.partial(_ray, 1), "ray-warm": functools.partial(_ray, 0)}
        if _has("ray")
        else {}
    ),
    "fork": _fork,
}
"""Name to a factory that takes the number of workers."""


def contestant(name: str, workers: int = 1) -> contextlib.AbstractContextManager[Caller]:
    """Start a contestant."""
    return CONTESTANTS[name](workers)
