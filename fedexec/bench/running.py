"""Parts, each in a process of its own that can be ended, with progress.

What is compared with each other is measured in turns, a round of each: a machine that others use too is
slower in one minute than in the next.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from fedexec.bench.document import Document
from fedexec.bench.estimate import Estimate
from fedexec.bench.parts import Part
from fedexec.bench.peers import contestants
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
    estimate = Estimate()
    print(f"{numbers.count(len(left), 'benchmark')}{_left(estimate.seconds(left))}", file=out, flush=True)
    for _, group in itertools.groupby(left, key=_compared):
        batch = list(group)
        if len(batch) > 1:
            names = ", ".join(part.strategy for part in batch)
            what = " ".join(filter(None, (batch[0].variant, f"{batch[0].group}s")))
            print(f"{what} of {batch[0].workload}, in turns: {names}", file=out, flush=True)
        began = time.monotonic()
        benchmarks = measure(batch, len(batch) * LIMIT_SECONDS[document.mode])
        estimate.add(batch, time.monotonic() - began)
        for part, benchmark in zip(batch, benchmarks, strict=True):
            document.add(part, benchmark)
            left = left[1:]
            title = f"[{len(parts) - len(left)}/{len(parts)}] {part.name.removeprefix('test_')}"
            print(f"{title} {_result(benchmark)}{_left(estimate.seconds(left))}", file=out, flush=True)


def _compared(part: Part) -> tuple[str, ...]:
    """Return what parts have in common that are measured in turns: a peer may be busy out of turn."""
    in_turns = part.group == "round" or (part.group == "start-up" and part.variant == "warm")
    if in_turns and not contestants()[part.strategy].peer:
        return (part.group, part.workload)
    return (part.name,)


def measure(parts: Sequence[Part], limit: float) -> list[dict[str, Any]]:
    """Measure some parts in turns; return the benchmark of each, or ``{"error": ...}``."""
    with contextlib.ExitStack() as stack:
        children = [_Child(stack.enter_context(_process()), part, limit) for part in parts]
        for child in children:
            stack.enter_context(child.timer)
        for child in children:
            child.hear()
        while any(child.waits for child in children):
            for child in children:
                if child.waits:
                    child.take_turn()
        return [child.answer() for child in children]


class _Child:
    """Our end of a process that measures one part."""

    def __init__(self, process: "subprocess.Popen[str]", part: Part, limit: float) -> None:
        self.timer = _Limit(process, limit)
        self._process = process
        self._limit = limit
        self._said = ""
        self._tell(json.dumps(part.as_dict()) + "\n")

    @property
    def waits(self) -> bool:
        """Whether it waits for its turn."""
        return self._said == "."

    def hear(self) -> None:
        """Wait until it says something: that it waits, or the first of what it measured."""
        assert self._process.stdout is not None
        self._said = self._process.stdout.read(1)

    def take_turn(self) -> None:
        """Have it go on until it says something."""
        self._tell("t")
        self.hear()

    def answer(self) -> dict[str, Any]:
        """Return what it measured, once it does not wait any more."""
        assert self._process.stdout is not None
        text = self._said + self._process.stdout.read()
        if self.timer.passed:
            return {"error": f"took longer than {self._limit:g} s"}
        if not text:
            return {"error": f"its process ended with {self._process.wait()}"}
        found: dict[str, Any] = json.loads(text)
        return found

    def _tell(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: that is heard
            self._process.stdin.write(text)
            self._process.stdin.flush()


@contextlib.contextmanager
def _process() -> Iterator["subprocess.Popen[str]"]:
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


def _result(benchmark: dict[str, Any]) -> str:
    if "error" in benchmark:
        return f"FAILED: {benchmark['error']}"
    stats = benchmark["stats"]
    return f"{numbers.seconds(stats['median'])}"


def _left(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"   about {minutes}:{rest:02} left" if seconds else ""
