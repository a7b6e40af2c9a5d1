"""Parts, each in a process of its own that can be ended, with progress.

What is compared with each other is measured in turns, a round of each: a machine that others use too is
slower in one minute than in the next.
"""

import contextlib
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fedexec._bench.estimate import Estimate, usual_seconds
from fedexec._bench.peers import contestants
from fedexec._bench.plan import Part, State
from fedexec._bench.progress import Progress, time_left
from fedexec._bench.result_file import Document
from fedexec._processes.leaving import end_group
from fedexec._report import numbers

__all__ = ["measure", "run_all"]

GRACE_SECONDS = 8.0  # to end in order
LIMIT_SECONDS = {"smoke": 300.0, "quick": 300.0, "full": 3600.0}  # of one part; a hang is a failure


def run_all(document: Document, parts: Sequence[Part], progress: Progress) -> None:
    """Measure what is not in the document yet; write it after each round, and after each part.

    Parameters
    ----------
    document : Document
    parts : sequence of Part
        In their order; what is compared with each other stands side by side.
    progress : Progress
        Is told what happens.

    Raises
    ------
    KeyboardInterrupt
        On Ctrl+C; the document holds all rounds that were finished, and nothing is left running.
    """
    batches = [list(batch) for _, batch in itertools.groupby(parts, key=_compared)]
    batches = [batch for batch in batches if not all(document.has(part) for part in batch)]
    course = _Course(document, parts, batches, progress)
    progress.say(f"{numbers.count(course.left, 'benchmark')}{time_left(course.seconds_left())}")
    for batch in batches:
        if len(batch) > 1:
            names = ", ".join(part.strategy for part in batch)
            progress.say(f"{_about(batch)}, in turns: {names}")
        began = time.monotonic()
        states = [document.state(part) for part in batch]
        course.begin(batch, states)
        benchmarks = measure(batch, LIMIT_SECONDS[document.mode], states, course.save)
        course.learn(time.monotonic() - began)
        for part, benchmark in zip(batch, benchmarks, strict=True):
            document.add(part, benchmark)
            course.end(part, benchmark)


class _Course:
    """How far a run is: what is saved after each round, and what is told of the time that is left."""

    def __init__(
        self, document: Document, parts: Sequence[Part], batches: list[list[Part]], progress: Progress
    ) -> None:
        self._document = document
        self._progress = progress
        self._estimate = Estimate()
        self._number = len(parts)
        self._waiting = [_rest(part, document.state(part)) for batch in batches for part in batch]
        self._all = sum(map(usual_seconds, self._waiting))
        self._batch: list[Part] = []
        self._measured: list[Part] = []  # what is left of the batch, when it began

    @property
    def left(self) -> int:
        """How many benchmarks there are to be measured."""
        return len(self._waiting)

    def seconds_left(self) -> float:
        """Return how long they may take."""
        return self._estimate.seconds(self._waiting)

    def begin(self, batch: list[Part], states: Sequence[State | None]) -> None:
        """Note what is measured from now on."""
        self._batch = batch
        self._measured = [_rest(part, state) for part, state in zip(batch, states, strict=True)]
        self._advance()

    def save(self, states: Sequence[State | None]) -> None:
        """Write what the parts have measured in the rounds that are over."""
        for part, state in zip(self._batch, states, strict=True):
            self._document.keep(part, state)
        self._document.write()
        done = len(self._measured)
        self._waiting[:done] = [_rest(part, state) for part, state in zip(self._batch, states, strict=True)]
        self._advance()

    def learn(self, seconds: float) -> None:
        """Note how long the batch took."""
        self._estimate.add(self._measured, seconds)

    def end(self, part: Part, benchmark: dict[str, Any]) -> None:
        """Tell what a part has measured."""
        del self._waiting[0]
        title = f"[{self._number - self.left}/{self._number}] {part.name.removeprefix('test_')}"
        text = f"{title} {_result(benchmark)}"
        self._progress.ended(text, self.seconds_left(), is_failure="error" in benchmark)

    def _advance(self) -> None:
        share = 1 - sum(map(usual_seconds, self._waiting)) / self._all if self._all else 1.0
        self._progress.advance(_about(self._batch), share, self.seconds_left())


def _about(batch: Sequence[Part]) -> str:
    """Return what is measured, as the beginning of a line."""
    if len(batch) == 1:
        return batch[0].name.removeprefix("test_")
    what = " ".join(filter(None, (batch[0].variant, f"{batch[0].group}s")))
    return f"{what} of {batch[0].workload}"


def _rest(part: Part, state: State | None) -> Part:
    """Return a part with the rounds that are left of it."""
    done = 0 if state is None else len(state["seconds"])
    return replace(part, rounds=max(0, part.rounds - done))


def _compared(part: Part) -> tuple[str, ...]:
    """Return what parts have in common that are measured in turns: a peer may be busy out of turn."""
    in_turns = part.group == "round" or (part.group == "start-up" and part.variant == "warm")
    if in_turns and not contestants()[part.strategy].peer:
        return (part.group, part.workload)
    return (part.name,)


def measure(
    parts: Sequence[Part],
    limit: float,
    states: Sequence[State | None] = (),
    after_round: Callable[[Sequence[State | None]], object] = lambda states: None,
) -> list[dict[str, Any]]:
    """Measure some parts in turns.

    Parameters
    ----------
    parts : sequence of Part
    limit : float
        Seconds that each of them may take, its own turns only.
    states : sequence of (dict or None), optional
        Where an earlier run has left off, for each part; None begins anew.
    after_round : callable
        Called with the state of each part when each has had its turn.

    Returns
    -------
    list of dict
        The benchmark of each part, or ``{"error": ...}``.
    """
    children: list[_Child] = []
    try:
        for part, state in zip(parts, states or [None] * len(parts), strict=True):
            children.append(_Child(part, limit, state))
        for child in children:
            child.hear()
        while any(child.waits for child in children):
            for child in children:
                if child.waits:
                    child.take_turn()
            after_round([child.state for child in children])
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

    def __init__(self, part: Part, limit: float, state: State | None) -> None:
        self.state = state
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
        self._tell(json.dumps({"part": part.as_dict(), "state": state}) + "\n")

    @property
    def waits(self) -> bool:
        """Whether it waits for its turn."""
        return self._said.startswith(".")

    def hear(self) -> None:
        """Wait until it says something: that it waits, and its state; or what it measured."""
        self._said = self._read_line()
        if self.waits and self._said.endswith("\n"):
            self.state = json.loads(self._said[1:])

    def take_turn(self) -> None:
        """Have it go on until it says something."""
        self._tell("t")
        self.hear()

    def answer(self) -> dict[str, Any]:
        """Return what it measured, once it does not wait any more."""
        if self._passed:
            return {"error": f"took longer than {self._limit:g} s"}
        try:
            found: dict[str, Any] = json.loads(self._said)
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
        end_group(self._process.pid)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _read_line(self) -> str:
        """Read a line, or to the end, for as long as it may take."""
        assert self._process.stdout is not None
        began = time.monotonic()
        timer = threading.Timer(self._left, self._pass)
        timer.start()
        try:
            return self._process.stdout.readline()
        finally:
            timer.cancel()
            self._left = max(0.0, self._left - (time.monotonic() - began))

    def _pass(self) -> None:
        self._passed = True
        end_group(self._process.pid)

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
