"""``fedexec bench``: measure every backend on this machine, with our jobs or a function of the user's.

Exit codes: 0 all was measured; 3 something failed, and is named in the file; 1 the user's task failed in a
trial; 2 wrong usage, also a file of another run; 130 Ctrl+C and 143 SIGTERM: what is done is kept, and the
same command goes on.
"""

import argparse
import contextlib
import importlib.util
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from fedexec._bench import machine
from fedexec._bench.peers import COPY, FORK, contestants
from fedexec._bench.plan import Part, missing, plan
from fedexec._bench.progress import Progress
from fedexec._bench.result_file import Document, OtherRunError
from fedexec._bench.running import LIMIT_SECONDS, run_all
from fedexec._bench.workloads import Workload
from fedexec._cli import options
from fedexec._cli.report import INCOMPLETE
from fedexec._cli.signals import Ending
from fedexec._cli.user_task import load_own_task
from fedexec._report import summarize
from fedexec._report.reading import is_busy
from fedexec._system.available_resources import available_cores
from fedexec._system.control_characters import visible
from fedexec._system.error_text import one_line
from fedexec.create import create_executor
from fedexec.errors import FedexecError, WorkerError

__all__ = ["command", "default_file"]


class _Terminated(BaseException):
    """SIGTERM."""


def command(arguments: argparse.Namespace) -> int:
    """Measure, and say what the file says."""
    given = load_own_task(arguments.task, arguments.arguments)
    own = None if given is None else given[0]
    path = _file(arguments.json or default_file(arguments.task))
    only = _only(arguments.only, arguments.mode)
    parts = plan(arguments.mode, own, only)
    if not any(part.group == "round" for part in parts):
        raise options.UsageError("--only leaves no backend to measure")
    document = Document(path, arguments.mode, parts, missing(arguments.mode, only))
    try:
        found = document.go_on()
    except OtherRunError as exc:
        raise options.UsageError(str(exc)) from exc
    lines = Progress(sys.stderr, quiet=arguments.quiet)
    if document.is_begun:
        then = "going on" if found < len(parts) else "delete it to measure anew"
        lines.say(f"{path} holds {found} of {len(parts)} benchmarks: {then}")
    elif given is not None:
        _try(given[1], given[2], LIMIT_SECONDS[arguments.mode], arguments.ending)
    _warn_if_busy()
    ended = _measure(lambda: _run(document, parts, lines, quiet=arguments.quiet))
    if ended:
        what = f"; what is done is in {path}: the same command goes on" if document.is_begun else ""
        print(f"\nfedexec: ended{what}", file=sys.stderr)
        return ended
    if not arguments.quiet:
        _tell(path)
    return INCOMPLETE if document.failed else 0


def default_file(task: str | None) -> str:
    """Return the name of the file for the built-in jobs, or for a task of the user's."""
    if task is None:
        return "fedexec-bench.json"
    name = re.sub(r"[^\w]+", "-", task)
    return f"fedexec-bench-{name}.json"


def _file(name: str) -> Path:
    path = options.outputs({"--json": name})["--json"]
    if path is None or path == options.STDOUT or (path.exists() and not path.is_file()):
        raise options.UsageError("--json names a file, in which a run that was interrupted goes on")
    return path


def _only(names: str | None, mode: str) -> list[str]:
    """Read the names of who is to take part."""
    only = [name.strip() for name in names.split(",")] if names else []
    known = [name for name in contestants() if name not in (COPY, FORK)]
    absent = missing(mode)
    for name in only:
        if name not in known or name in absent:
            why = absent.get(name, f"there are {', '.join(known)}")
            raise options.UsageError(f"--only {name}: {why}")
    return only


def _try(job: Workload, arguments: tuple[Any, ...], seconds: float, ending: Ending) -> None:
    """Run the user's task once: one that is broken would fail on every backend.

    Raises
    ------
    FedexecError
        It failed; its traceback has been shown.
    """
    with create_executor(max_workers=1, preload=job.preload, timeout=seconds) as executor:
        ending.prepare(stop=executor.kill_workers)
        error = executor.submit(job.fn, *arguments).exception()
        if error is None:
            return
        ending.settle()
    if not isinstance(error, WorkerError):  # which tells all that is known
        print(visible(_traceback_of(error), lines=True), file=sys.stderr)
    raise FedexecError(f"--task {job.name} fails, so nothing was measured: {one_line(error)}") from error


def _traceback_of(error: BaseException) -> str:
    """Return the traceback of a task: that of its worker, where it ran in one."""
    cause = str(error.__cause__ or "").strip().strip('"').strip()
    return cause or "".join(traceback.format_exception(error)).strip()


def _warn_if_busy() -> None:
    load = (machine.load() or [0.0])[0]
    if is_busy(load, available_cores()):
        print(
            f"This machine is busy, load {load:.0f}: there will be figures, but no verdict", file=sys.stderr
        )


def _run(document: Document, parts: list[Part], lines: Progress, *, quiet: bool) -> None:
    """Measure, with a bar where there is a terminal that shows one."""
    with contextlib.ExitStack() as stack:
        if not quiet and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
            from fedexec._cli.bench_bar import BenchBar

            lines = stack.enter_context(BenchBar())
        run_all(document, parts, lines)


def _measure(work: Callable[[], object]) -> int:
    """Return 0, or the exit code of the signal that ended it."""

    def terminate(number: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    before = {
        signal.SIGTERM: signal.signal(signal.SIGTERM, terminate),
        signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler),
    }
    try:
        work()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except _Terminated:
        return 128 + signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _tell(path: Path) -> None:
    """Print what the file says of each job, and how to read more of it."""
    for section in summarize([path]).sections:
        print(visible(f"{section.workload}: {section.verdict.text}"))
    print(f"Wrote {path}. The table, the plots: fedexec report {path} --html report.html")
