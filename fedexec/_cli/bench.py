"""``fedexec bench``: measure every backend on this machine, with our jobs or a function of the user's.

Exit codes: 0 all was measured; 3 something failed, and is named in the file; 2 wrong usage, also a file of
another run; 130 Ctrl+C and 143 SIGTERM: what was finished is kept, and the same command goes on.
"""

import argparse
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from fedexec._bench import machine
from fedexec._bench.peers import COPY, FORK, contestants
from fedexec._bench.plan import missing, plan
from fedexec._bench.result_file import Document, OtherRunError
from fedexec._bench.running import run_all
from fedexec._cli import options
from fedexec._cli.own_task import load_own_task
from fedexec._cli.report import INCOMPLETE
from fedexec._report import summarize
from fedexec._report.reading import is_busy
from fedexec._system.machine import available_cores
from fedexec._system.visible import visible

__all__ = ["command"]


class _Terminated(BaseException):
    """SIGTERM."""


def command(arguments: argparse.Namespace) -> int:
    """Measure, and say what the file says."""
    given = load_own_task(arguments.task, arguments.arguments)
    own = None if given is None else given[0]
    path = options.outputs({"--json": arguments.json})["--json"]
    if path is None or path == options.STDOUT or (path.exists() and not path.is_file()):
        raise options.UsageError("--json names a file, in which a run that was interrupted goes on")
    only = _only(arguments.only, arguments.mode)
    parts = plan(arguments.mode, own, only)
    if not any(part.group == "round" for part in parts):
        raise options.UsageError("nobody is left to be measured")
    document = Document(path, arguments.mode, parts, missing(arguments.mode, only))
    try:
        found = document.go_on()
    except OtherRunError as exc:
        raise options.UsageError(str(exc)) from exc
    if found:
        then = "going on" if found < len(parts) else "delete it to measure anew"
        print(f"{path} holds {found} of {len(parts)} benchmarks: {then}", file=sys.stderr)
    load = (machine.load() or [0.0])[0]
    if is_busy(load, available_cores()):
        print(
            f"This machine is busy, load {load:.0f}: there will be figures, but no verdict", file=sys.stderr
        )
    ended = _measure(lambda: run_all(document, parts, sys.stderr))
    if ended:
        print(f"\nfedexec: ended; what is done is in {path}: the same command goes on", file=sys.stderr)
        return ended
    for section in summarize([path]).sections:
        print(visible(f"{section.workload}: {section.verdict.text}"))
    print(f"Wrote {path}. The table, the plots: fedexec report {path} --html report.html")
    return INCOMPLETE if document.failed else 0


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


def _measure(work: Callable[[], object]) -> int:
    """Return 0, or the exit code of the signal that ended it."""

    def terminate(number: int, frame: FrameType | None) -> Any:
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
