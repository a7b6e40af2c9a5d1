"""Parts one after the other, each in a process of its own that can be ended, with progress."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from fedexec.bench.document import Document
from fedexec.bench.parts import Part
from fedexec.report import numbers

__all__ = ["measure", "run_all"]

GRACE_SECONDS = 8.0  # to end in order
LIMIT_SECONDS = {"smoke": 300.0, "quick": 300.0, "full": 3600.0}  # of one part; a hang is a failure


def run_all(document: Document, parts: Sequence[Part], out: TextIO) -> None:
    """Measure what is not in the document yet, and write it after each part.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl+C; the document holds what was finished, and nothing is left running.
    """
    left = [part for part in parts if not document.has(part)]
    took: dict[str, list[float]] = {}
    for index, part in enumerate(left):
        number = len(parts) - len(left) + index + 1
        title = part.name.removeprefix("test_")
        print(f"[{number}/{len(parts)}] {title}", end=" ", file=out, flush=True)
        began = time.monotonic()
        benchmark = measure(part, LIMIT_SECONDS[document.mode])
        document.add(part, benchmark)
        took.setdefault(_kind(part), []).append(time.monotonic() - began)
        print(f"{_result(benchmark)}{_left(took, left[index + 1 :])}", file=out, flush=True)


def measure(part: Part, limit: float) -> dict[str, Any]:
    """Measure one part; return its benchmark, or ``{"error": ...}``."""
    with _child() as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(part.as_dict()) + "\n")
        process.stdin.flush()
        timer = _Limit(process, limit)
        with timer:
            answer = process.stdout.read()
    if timer.passed:
        return {"error": f"took longer than {limit:g} s"}
    if not answer:
        return {"error": f"its process ended with {process.returncode}"}
    found: dict[str, Any] = json.loads(answer)
    return found


@contextlib.contextmanager
def _child() -> Iterator["subprocess.Popen[str]"]:
    """Start the child as leader of a group, so that Ctrl+C is ours to pass on, and its end is everybody's."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fedexec.bench.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # which asks it to end
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # whoever a peer has left behind
        process.wait()
        process.stdout.close()


class _Limit:
    """Kills a process that takes too long."""

    def __init__(self, process: "subprocess.Popen[str]", seconds: float) -> None:
        import threading

        self.passed = False
        self._process = process
        self._timer = threading.Timer(seconds, self._pass)

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, *exc: object) -> None:
        self._timer.cancel()

    def _pass(self) -> None:
        self.passed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _kind(part: Part) -> str:
    return f"{part.group} {part.workload}"


def _result(benchmark: dict[str, Any]) -> str:
    if "error" in benchmark:
        return f"FAILED: {benchmark['error']}"
    stats = benchmark["stats"]
    return f"{numbers.seconds(stats['median'])}"


def _left(took: dict[str, list[float]], parts: Sequence[Part]) -> str:
    """Guess the time left: a part takes what others of its group and job took, else what all did."""
    if not parts:
        return ""
    everything = [seconds for some in took.values() for seconds in some]
    usual = sum(everything) / len(everything)
    total = 0.0
    for part in parts:
        known = took.get(_kind(part))
        total += sum(known) / len(known) if known else usual
    minutes, seconds = divmod(round(total), 60)
    return f"   about {minutes}:{seconds:02} left"
