"""Who takes part: every backend of fedexec, and what else a person could use.

A contestant is a context manager that gives a :class:`Caller`. All of them run tasks in processes that have
imported what the job needs and, but for the tutorial's, hold to their share of the cores; loky's workers have
been warmed up like our template.
"""

import concurrent.futures
import contextlib
import functools
import importlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import fedexec
from fedexec._bench import tasks
from fedexec._bench.workloads import Workload
from fedexec._registry import load
from fedexec._report.schema import FRESH, REUSED, THREAD
from fedexec._system.available_resources import available_cores
from fedexec._worker.threads import THREAD_VARIABLES
from fedexec.interface import Capability

__all__ = ["COPY", "FORK", "TUTORIAL", "Caller", "Contestant", "contestants"]

TUTORIAL = "tutorial"
FORK, COPY = "fork", "copy"  # what nothing can be faster than: no real contestants


@dataclass
class Caller:
    """How a contestant runs tasks.

    Attributes
    ----------
    call : callable
        ``call(fn, *args)`` runs one task and waits for its result.
    submit : callable
        ``submit(fn, *args)`` returns something with a ``result()``.
    settings : dict
        An executor's.
    """

    call: Callable[..., Any]
    submit: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, submit: Callable[..., Any], settings: dict[str, Any] | None = None) -> "Caller":
        """Make one that calls by submitting."""
        return cls(lambda fn, *args: submit(fn, *args).result(), submit, settings or {})


@dataclass(frozen=True, slots=True)
class Contestant:
    """Who takes part.

    Attributes
    ----------
    opens : callable
        Takes the job and the number of workers; returns a context manager that gives a :class:`Caller`.
    slow : bool
        Needs seconds for each task.
    needs : tuple of str
        Packages.
    imports : tuple of str
        Modules that a program has imported before it asks for a worker.
    broken : str or None
        Why it cannot take part, if that is known.
    """

    name: str
    isolation: str
    opens: Callable[[Workload, int], contextlib.AbstractContextManager[Caller]]
    peer: bool = True
    slow: bool = False
    needs: tuple[str, ...] = ()
    imports: tuple[str, ...] = ()
    broken: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot take part here."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{absent[0]} is not installed" if absent else self.broken


def contestants() -> dict[str, Contestant]:
    """Return everybody, by name, also who cannot take part here."""
    return {one.name: one for one in (*_backends(), *_PEERS)}


def _backends() -> Iterator[Contestant]:
    for info in fedexec.backends():
        promises, broken = info.capabilities, None
        if promises is None:  # a plug-in, which only its class tells
            try:
                promises = load(info.name).capabilities
            except fedexec.BackendUnavailableError as exc:
                promises, broken = Capability(0), str(exc)
        if Capability.REMOTE in promises:
            continue  # it measures machines and their network, which no figure of one machine compares with
        isolation = THREAD
        if Capability.ISOLATED in promises:
            isolation = FRESH if Capability.FRESH_PROCESS in promises else REUSED
        yield Contestant(
            info.name,
            isolation,
            functools.partial(_ours, info.name),
            peer=False,
            needs=(info.requires,) if info.requires else (),
            imports=(info.target.partition(":")[0],),
            broken=broken,
        )


def _threads(workers: int) -> int:
    return max(1, available_cores() // workers)


@contextlib.contextmanager
def _ours(name: str, job: Workload, workers: int) -> Iterator[Caller]:
    with fedexec.create_executor(
        name, max_workers=workers, preload=job.preload, warmup=job.warmup
    ) as executor:
        yield Caller.of(executor.submit, executor.settings.as_dict())


@contextlib.contextmanager
def _tutorial(job: Workload, workers: int) -> Iterator[Caller]:
    from fedexec._bench import tutorial

    with concurrent.futures.ThreadPoolExecutor(workers) as clients:  # the tutorial: a process each
        yield Caller(tutorial.call, lambda fn, *args: clients.submit(tutorial.call, fn, *args))


@contextlib.contextmanager
def _pool(method: str, job: Workload, workers: int) -> Iterator[Caller]:
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(list(job.preload))
    with concurrent.futures.ProcessPoolExecutor(
        workers,
        mp_context=context,
        max_tasks_per_child=1,
        initializer=tasks.prepare,
        initargs=(job.preload, None, _threads(workers)),
    ) as pool:
        yield Caller.of(pool.submit)


@contextlib.contextmanager
def _loky(job: Workload, workers: int) -> Iterator[Caller]:
    import loky

    initargs = (job.preload, job.warmup, _threads(workers))
    pool = loky.ProcessPoolExecutor(workers, initializer=tasks.prepare, initargs=initargs)
    try:
        yield Caller.of(pool.submit)
    finally:
        pool.shutdown()


@contextlib.contextmanager
def _deadpool(job: Workload, workers: int) -> Iterator[Caller]:
    from deadpool import Deadpool

    with Deadpool(
        max_workers=workers,
        max_tasks_per_child=1,
        initializer=tasks.prepare,
        initargs=(job.preload, None, _threads(workers)),
    ) as pool:
        yield Caller.of(pool.submit)


@contextlib.contextmanager
def _ray(max_calls: int, job: Workload, workers: int) -> Iterator[Caller]:
    ray: Any = importlib.import_module("ray")  # mypy knows its types where it is installed, and only there
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environ = {"PYTHONPATH": path} | {name: value for name, value in os.environ.items() if "FEDEXEC" in name}
    ray.init(
        num_cpus=workers, include_dashboard=False, log_to_driver=False, configure_logging=False,
        runtime_env={"env_vars": environ},
    )  # fmt: skip
    threads = _threads(workers)

    def run(fn: Callable[..., Any], *args: Any) -> Any:
        tasks.prepare(job.preload, None, threads)
        return fn(*args)

    remote = ray.remote(num_cpus=1, max_calls=max_calls, max_retries=0)(run)

    @dataclass
    class Answer:
        reference: Any

        def result(self) -> Any:
            return ray.get(self.reference)

    def submit(fn: Callable[..., Any], *args: Any) -> Answer:
        return Answer(remote.remote(fn, *args))

    try:
        yield Caller.of(submit)
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _flower(job: Workload, workers: int) -> Iterator[Caller]:
    from fedexec._bench.engine import engine

    with engine(job.preload, workers, _threads(workers)) as submit:
        yield Caller.of(submit)


@contextlib.contextmanager
def _fork(job: Workload, workers: int) -> Iterator[Caller]:
    """A process with the same imports that forks, has the child end at once, and waits for it."""
    code = (
        "import os, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from fedexec._bench import tasks\n"
        f"tasks.prepare({job.preload!r}, None, 1)\n"
        "while sys.stdin.buffer.read(1):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        "    os.write(1, b'.')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        env=os.environ | dict.fromkeys(THREAD_VARIABLES, "1"),
    )
    assert process.stdin is not None and process.stdout is not None
    write, read = process.stdin.write, process.stdout.read

    def call(fn: Callable[..., Any]) -> None:
        write(b".")
        read(1)

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
        process.stdout.close()
        process.wait()


@contextlib.contextmanager
def _copy(job: Workload, workers: int) -> Iterator[Caller]:
    """Copy the arrays, and nothing else."""

    def call(fn: Callable[..., Any], arrays: list[Any]) -> list[Any]:
        return [array.copy() for array in arrays]

    yield Caller(call, call)


_POOLS = ("concurrent.futures.process",)
_PEERS = (
    Contestant(
        TUTORIAL, FRESH, _tutorial, slow=True, needs=("flwr", "torch", "torchvision"),
        imports=("fedexec._bench.tutorial",),
    ),
    Contestant("ppe-spawn", FRESH, functools.partial(_pool, "spawn"), slow=True, imports=_POOLS),
    Contestant("ppe-forkserver", FRESH, functools.partial(_pool, "forkserver"), imports=_POOLS),
    Contestant("plain-loky", REUSED, _loky, needs=("loky",), imports=("loky",)),
    Contestant("deadpool", FRESH, _deadpool, slow=True, needs=("deadpool",), imports=("deadpool",)),
    Contestant("ray-fresh", FRESH, functools.partial(_ray, 1), slow=True, needs=("ray",), imports=("ray",)),
    Contestant("ray-warm", REUSED, functools.partial(_ray, 0), needs=("ray",), imports=("ray",)),
    Contestant(
        "flower-ray", REUSED, _flower, needs=("flwr", "ray"), imports=("fedexec._bench.engine", "ray")
    ),
    Contestant(FORK, FRESH, _fork),
    Contestant(COPY, THREAD, _copy),
)  # fmt: skip
