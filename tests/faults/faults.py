"""What can befall a task, and what is to be heard of it; and runs in which one task in many meets it."""

import contextlib
import errno
import importlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil

import fedexec
from fedexec.errors import TaskTimeoutError, WorkerDiedError
from fedexec.testing import bad_tasks, tasks
from fedexec.testing.leaks import living, memory_of, new_children, still_named

__all__ = ["FAULTS", "KILL", "Report", "plan_of", "run_plan"]

TIMEOUT = 2.0  # seconds, of what hangs or is stopped
HUGE = 32 << 20
KILL = "process killed"  # any of the executor's: a worker, its template, a Manager
STOP = "executor's process is stopped"
LEARNT = "hypothesis"  # what some innocent tasks import
STOPPED_SECONDS = 10.0  # deadline of innocent tasks, any of which may run in a process that is stopped


# ---------------------------------------------------------------- faults, as tasks


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def exit_slowly() -> str:
    threading.Thread(target=time.sleep, args=(1.0,)).start()  # the interpreter waits for it
    return "slow"


def exhaust_memory() -> NoReturn:
    with _limit(resource.RLIMIT_AS, psutil.Process().memory_info().vms + (64 << 20)):
        bytearray(1 << 30)
    raise AssertionError("there was memory")


def exhaust_disk() -> NoReturn:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with _limit(resource.RLIMIT_FSIZE, 0), tempfile.TemporaryFile() as file:
        os.write(file.fileno(), b"x")
    raise AssertionError("there was room")


def exhaust_descriptors() -> NoReturn:
    taken = []
    try:
        with _limit(resource.RLIMIT_NOFILE, 64):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
    finally:
        for fd in taken:
            os.close(fd)


def return_much() -> bytes:
    return bytes(HUGE)


def return_lock() -> Any:
    return threading.Lock()


def flood_stderr() -> str:
    for _ in range(64):
        os.write(2, b"x" * 4095 + b"\n")
    return "flooded"


def plant_tree() -> list[int]:
    """Start 20 processes, the half of them by another; return their ids."""
    nested = (
        "import subprocess; print(*[subprocess.Popen(['sleep', '1000']).pid for _ in range(10)], flush=True)"
    )
    children = [subprocess.Popen(["sleep", "1000"]).pid for _ in range(9)]
    parent = subprocess.Popen(
        [sys.executable, "-S", "-c", nested + "; input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    return [*children, parent.pid, *map(int, parent.stdout.readline().split())]


def version_of(package: str) -> str:
    """Import a package, which the template learns when a few tasks have."""
    version: str = importlib.import_module(package).__version__
    return version


class DiesPickled:
    """Ends the process that pickles it."""

    def __reduce__(self) -> Any:
        bad_tasks.kill_self()


class DiesUnpickled:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return bad_tasks.kill_self, ()


class _limit:  # noqa: N801
    """Lowers a limit of this process for a while."""

    def __init__(self, what: int, soft: int) -> None:
        self._what, self._soft = what, soft

    def __enter__(self) -> None:
        self._before = resource.getrlimit(self._what)
        resource.setrlimit(self._what, (self._soft, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(self._what, self._before)


# ---------------------------------------------------------------- what is to be heard of them


@dataclass(frozen=True)
class Fault:
    """A task that meets a fault, and how to tell that its future says the truth.

    Attributes
    ----------
    fn : callable
    is_true : callable ``(value, error) -> bool``
    args : tuple
    timeout : float or None
        Seconds.
    """

    fn: Callable[..., Any]
    is_true: Callable[[Any, BaseException | None], bool]
    args: tuple[Any, ...] = ()
    timeout: float | None = None


def _died(exitcode: int) -> Callable[[Any, BaseException | None], bool]:
    return lambda value, error: type(error) is WorkerDiedError and error.exitcode == exitcode


def _raised(
    kind: type[BaseException], number: int | None = None
) -> Callable[[Any, BaseException | None], bool]:
    return lambda value, error: type(error) is kind and number in (None, getattr(error, "errno", None))


def _returned(wanted: Any) -> Callable[[Any, BaseException | None], bool]:
    return lambda value, error: error is None and value == wanted


FAULTS = {
    "raise": Fault(divmod, _raised(ZeroDivisionError), (1, 0)),
    "exit": Fault(os._exit, _died(3), (3,)),
    "SIGKILL": Fault(bad_tasks.kill_self, _died(-signal.SIGKILL)),
    "SIGSTOP": Fault(stop, _raised(TaskTimeoutError), timeout=TIMEOUT),
    "segfault": Fault(tasks.segfault, _died(-signal.SIGSEGV)),
    "hang": Fault(bad_tasks.hang, _raised(TaskTimeoutError), timeout=TIMEOUT),
    "slow exit": Fault(exit_slowly, _returned("slow")),
    "no memory": Fault(exhaust_memory, _raised(MemoryError)),
    "full disk": Fault(exhaust_disk, lambda value, error: isinstance(error, OSError)),
    "no descriptors": Fault(exhaust_descriptors, _raised(OSError, errno.EMFILE)),
    "huge result": Fault(return_much, _returned(bytes(HUGE))),
    "unpicklable result": Fault(return_lock, _raised(TypeError)),
    "stderr flood": Fault(flood_stderr, _returned("flooded")),
    "tree of processes": Fault(plant_tree, lambda value, error: error is None and len(value) == 20),
    "death while pickling": Fault(DiesPickled, _died(-signal.SIGKILL)),
    "death while unpickling": Fault(tasks.capture, _died(-signal.SIGKILL), (DiesUnpickled(),)),
}


# ---------------------------------------------------------------- runs


@dataclass
class Report:
    """What became of a run's tasks, and what is left of it.

    Attributes
    ----------
    tasks : int
    faults : Counter
        How many of each kind.
    lost : int
        Futures that did not resolve, or more than once.
    wrong : list of str
        What resolved with something else than the truth.
    left : list of str
        Processes, shared memory and descriptors.
    seconds : float
    learnt : int
        How many modules the template has learnt meanwhile.
    """

    tasks: int
    faults: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0
    learnt: int = 0

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.wrong or self.left)


def run_plan(backend: str, plan: list[str | None], seed: int, retries: int = 0) -> Report:
    """Run a task for each entry of `plan`: the fault of that name, or for None an innocent one.

    With KILL, one of the executor's processes is killed when an innocent task is done. What runs then may
    die: `retries` must be enough for all kills, and the plan hold no other fault. With STOP the process is
    stopped, and what runs in it ends at its deadline.
    """
    report = Report(len(plan), Counter(name for name in plan if name is not None))
    with fedexec.create_executor(backend, max_workers=2) as executor:  # what every process starts once
        executor.submit(pow, 2, 3).result(tasks.DEADLINE)
    processes, segments, descriptors = new_children(), set(), _descriptors()
    generator = np.random.default_rng(seed)
    resolved: Counter[int] = Counter()
    trees: list[psutil.Process] = []
    begun = time.monotonic()
    victims = random.Random(seed)
    with fedexec.create_executor(backend, max_workers=2, retries=retries) as executor:
        view = executor.with_options(timeout=STOPPED_SECONDS if STOP in plan else None)
        for start in range(0, len(plan), 500):
            futures = []
            for number, name in enumerate(plan[start : start + 500], start):
                future, is_true = _submit(view, name, number, generator)
                future.add_done_callback(_counting(number, resolved))
                futures.append((future, name, is_true))
            segments |= memory_of([psutil.Process(), *new_children(processes)])
            for number, (future, name, is_true) in enumerate(futures, start):
                try:
                    error, value = future.exception(300), None
                except TimeoutError:
                    report.lost += 1
                    continue
                if error is None:
                    value = future.result()
                    if name == "tree of processes":
                        trees += [psutil.Process(pid) for pid in value if psutil.pid_exists(pid)]
                if name in (KILL, STOP) and (alive := new_children(processes)):
                    victim = victims.choice(sorted(alive, key=lambda process: process.pid))
                    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended just now
                        victim.kill() if name == KILL else victim.suspend()
                is_late = STOP in plan and isinstance(error, fedexec.TaskTimeoutError)
                if not is_true(value, error) and not is_late:
                    report.wrong.append(
                        f"{number} {name}: {error!r}" if error else f"{number} {name}: {value!r:.99}"
                    )
            del futures, future, is_true, value, error
        report.learnt = executor.stats().learning.get("modules", 0)
    report.seconds = time.monotonic() - begun
    report.lost += sum(1 for number in range(len(plan)) if resolved[number] > 1)
    try:
        tasks.poll(lambda: not (new_children(processes) or living(trees)), "all processes ended", seconds=2)
    except AssertionError:
        report.left += [str(process) for process in (*new_children(processes), *living(trees))]
    report.left += [str(path) for path in still_named(segments)]
    report.left += [f"descriptor {each}" for each in _descriptors() - descriptors]
    return report


def plan_of(number: int, share: float, seed: int, kinds: Sequence[str] = tuple(FAULTS)) -> list[str | None]:
    """Return `number` entries of which `share` are faults, of all kinds as evenly as can be, in any order."""
    faults = [kinds[index % len(kinds)] for index in range(round(number * share))]
    plan: list[str | None] = [*faults, *[None] * (number - len(faults))]
    random.Random(seed).shuffle(plan)
    return plan


def _submit(
    executor: fedexec.Executor, name: str | None, number: int, generator: np.random.Generator
) -> tuple[fedexec.Future[Any], Callable[[Any, BaseException | None], bool]]:
    if name in FAULTS:
        fault = FAULTS[name]
        view = executor.with_options(timeout=fault.timeout, tag=name)
        return view.submit(fault.fn, *fault.args), fault.is_true
    if number % 10 == 0:
        return executor.submit(version_of, LEARNT), _returned(version_of(LEARNT))
    if number % 4:
        return executor.submit(tasks.add, number, 1), _returned(number + 1)
    array = generator.integers(0, 1000, 50_000)  # large enough for shared memory
    return executor.submit(
        np.sort, array
    ), lambda value, error: error is None and bool((value == np.sort(array)).all())


def _counting(number: int, resolved: Counter[int]) -> Callable[[object], None]:
    return lambda _: resolved.update([number])


def _descriptors() -> set[str]:
    """Return number and target of every open descriptor."""
    found = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the listing itself
            found.add(f"{fd.name} {fd.readlink()}")
    return found
