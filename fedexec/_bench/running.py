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
import threading
import time
from collections.abc import Sequence
from typing import Any, TextIO

from fedexec._bench.estimate import Estimate
from fedexec._bench.peers import contestants
from fedexec._bench.plan import Part
from fedexec._bench.result_file import Document
from fedexec._report import numbers
from fedexec._system.visible import visible

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
    batches = [list(batch) for _, batch in itertools.groupby(parts, key=_compared)]
    batches = [batch for batch in batches if not all(document.has(part) for part in batch)]
    left = [part for batch in batches for part in batch]
    estimate = Estimate()
    print(f"{numbers.count(len(left), 'benchmark')}{_left(estimate.seconds(left))}", file=out, flush=True)
    for batch in batches:
        if len(batch) > 1:
            names = ", ".join(part.strategy for part in batch)
            what = " ".join(filter(None, (batch[0].variant, f"{batch[0].group}s")))
            print(f"{what} of {batch[0].workload}, in turns: {names}", file=out, flush=True)
        began = time.monotonic()
        benchmarks = measure(batch, LIMIT_SECONDS[document.mode])
        estimate.add(batch, time.monotonic() - began)
        for part, benchmark in zip(batch, benchmarks, strict=True):
            document.add(part, benchmark)
            left = left[1:]
            title = f"[{len(parts) - len(left)}/{len(parts)}] {part.name.removeprefix('test_')}"
            result = visible(f"{title} {_result(benchmark)}{_left(estimate.seconds(left))}")
            print(result, file=out, flush=True)


def _compared(part: Part) -> tuple[str, ...]:
    """Return what parts have in common that are measured in turns: a peer may be busy out of turn."""
    in_turns = part.group == "round" or (part.group == "start-up" and part.variant == "warm")
    if in_turns and not contestants()[part.strategy].peer:
        return (part.group, part.workload)
    return (part.name,)


def measure(parts: Sequence[Part], limit: float) -> list[dict[str, Any]]:
    """Measure some parts in turns; return the benchmark of each, or ``{"error": ...}``.

    Parameters
    ----------
    limit : float
        Seconds that each of them may take, its own turns only.
    """
    children: list[_Child] = []
    try:
        for part in parts:
            children.append(_Child(part, limit))
        for child in children:
            child.hear()
        while any(child.waits for child in children):
            for child in children:
                if child.waits:
                    child.take_turn()
        return [child.answer() for child in children]
    finally:
        _end(children)


def _end(children: "Sequence[_Child]") -> None:
    """Let all end in order, at once; who does not, or is left behind by one, is killed."""
    try:
        deadline = time.monotonic() + GRACE_SECONDS
        for child in children:
            child.let_end()
        for child in children:
            child.wait_until(deadline)
    finally:  # also when Ctrl+C is pressed again
        for child in children:
            child.kill()


class _Child:
    """A process that measures one part, leader of a group: Ctrl+C is ours to pass on."""

    def __init__(self, part: Part, limit: float) -> None:
        self._limit = self._left = limit
        self._passed = False
        self._said = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fedexec._bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            process_group=0,
        )
        self._tell(json.dumps(part.as_dict()) + "\n")

    @property
    def waits(self) -> bool:
        """Whether it waits for its turn."""
        return self._said == "."

    def hear(self) -> None:
        """Wait until it says something: that it waits, or the first of what it measured."""
        self._said = self._read(1)

    def take_turn(self) -> None:
        """Have it go on until it says something."""
        self._tell("t")
        self.hear()

    def answer(self) -> dict[str, Any]:
        """Return what it measured, once it does not wait any more."""
        text = self._said + self._read()
        if self._passed:
            return {"error": f"took longer than {self._limit:g} s"}
        try:
            found: dict[str, Any] = json.loads(text)
        except ValueError:
            self.wait_until(time.monotonic() + GRACE_SECONDS)
            return {"error": f"its process ended with {self._process.returncode}"}
        return found

    def let_end(self) -> None:
        """Close its stdin, which asks it to end."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def wait_until(self, deadline: float) -> None:
        """Wait until it has ended, but not for ever."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, deadline - time.monotonic()))

    def kill(self) -> None:
        """Kill it, and whoever it has left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read(self, size: int = -1) -> str:
        """Read what it says, for as long as it may take."""
        assert self._process.stdout is not None
        began = time.monotonic()
        timer = threading.Timer(self._left, self._pass)
        timer.start()
        try:
            return self._process.stdout.read(size)
        finally:
            timer.cancel()
            self._left = max(0.0, self._left - (time.monotonic() - began))

    def _pass(self) -> None:
        self._passed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _tell(self, text: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: that is heard
            self._process.stdin.write(text)
            self._process.stdin.flush()


def _result(benchmark: dict[str, Any]) -> str:
    if "error" in benchmark:
        return f"FAILED: {benchmark['error']}"
    stats = benchmark["stats"]
    return f"{numbers.seconds(stats['median'])}"


def _left(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"   about {minutes}:{rest:02} left" if seconds else ""
