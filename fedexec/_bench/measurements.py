"""What each group of benchmarks does with a contestant."""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

from fedexec._bench import tasks
from fedexec._bench.plan import Part
from fedexec._bench.session import Rounds, Session, pause
from fedexec._report.schema import FRESH
from fedexec._system.environment import environment
from fedexec.devices.device import Device
from fedexec.devices.discovery import find_devices
from fedexec.memory.timeline import Timeline

__all__ = ["open_session"]

GAP = 0.1  # seconds between two tasks, as between two messages of a server
TICK = 1 / os.sysconf("SC_CLK_TCK")
SETTLE = 0.3  # seconds after a round, before what is left is measured
LOOK = 0.2  # seconds between two looks at the host's memory, in the pass that is for memory
EMULATED = "emulated:24GiB"
ROUNDS_FOR_ONE_ALONE = 3  # clients are run alone, to tell their phases: a third as many as there are rounds


def open_session(part: Part) -> Session:
    """Return what measures a part."""
    kinds: dict[str, Callable[[Part], Session]] = {
        "start-up": _Cold if part.variant == "cold" else _Warm,
        "overhead": _Burst,
        "transport": _Readers if (part.variant or "").endswith("readers") else _ThereAndBack,
        "round": _Round,
        "scaling": Rounds,
        "footprint": _Footprint,
        "faults": _Faults,
    }
    return kinds[part.group](part)


class _Cold(Session):
    """A new program, with everything imported that asks for a worker: until its first task has a result."""

    _process: "subprocess.Popen[str] | None" = None

    def open(self, stack: contextlib.ExitStack) -> None:
        stack.callback(self._end)

    def setup(self) -> None:
        self._end()
        command = [sys.executable, "-m", "fedexec._bench.cold_start", json.dumps(self.part.as_dict())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self._expect("ready")

    def call(self) -> None:
        if self._process is None:
            self.setup()
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._expect("done")

    def _expect(self, word: str) -> None:
        assert self._process is not None and self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != word:
            raise RuntimeError(f"{self.part.strategy} did not start: {said or 'its process ended'}")

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


class _Warm(Session):
    """A task that does nothing, now and then."""

    def open(self, stack: contextlib.ExitStack) -> None:
        self._call = self.caller(stack).call
        self._call(tasks.nothing)

    def setup(self) -> None:
        pause(GAP)

    def call(self) -> None:
        self._call(tasks.nothing)


class _Burst(Session):
    """Tasks that do nothing, back to back."""

    def open(self, stack: contextlib.ExitStack) -> None:
        self._submit = self.caller(stack).submit
        self._submit(tasks.nothing).result()

    def call(self) -> None:
        for future in [self._submit(tasks.nothing) for _ in range(self.part.clients)]:
            future.result()


class _ThereAndBack(Session):
    """100 MB of float32, as ten arrays of 10 MB, sent to a worker and back."""

    def open(self, stack: contextlib.ExitStack) -> None:
        rng = np.random.default_rng(0)
        self.arrays = [rng.random(2_500_000, dtype=np.float32) for _ in range(10)]
        self._call = self.caller(stack).call

    def setup(self) -> None:
        for array in self.arrays:  # another round, other weights: nothing may be remembered
            array[0] += 1

    def call(self) -> None:
        result = self._call(tasks.give_back, self.arrays)
        if not all(one[0] == sent[0] for one, sent in zip(result, self.arrays, strict=True)):
            raise RuntimeError("what came back is not what was sent")


class _Readers(_ThereAndBack):
    """The same arrays for several clients, which read every page."""

    def open(self, stack: contextlib.ExitStack) -> None:
        rng = np.random.default_rng(0)
        self.arrays = [rng.random(2_500_000, dtype=np.float32) for _ in range(10)]
        self._submit = self.caller(stack).submit

    def call(self) -> None:
        for future in [self._submit(tasks.read, self.arrays) for _ in range(self.part.clients)]:
            future.result()


class _Round(Rounds):
    """Rounds, and before them some clients alone, whose phases are told apart."""

    _alone_before = False
    _phases: "dict[str, float] | None" = None

    def setup(self) -> None:
        if not self._alone_before:  # not when opened: others may open at that time
            self._alone_before = True
            self._run_alone(max(1, self.part.rounds // ROUNDS_FOR_ONE_ALONE))
        super().setup()

    def _run_alone(self, repeat: int) -> None:
        self._caller.call(tasks.stamped, self.job.fn, *self._arguments[0])
        empty = [self._alone(tasks.nothing, ()) for _ in range(repeat)]
        full = [self._alone(self.job.fn, self._arguments[0]) for _ in range(repeat)]
        if None not in empty and None not in full:
            self._phases = _phases(empty, full)

    def _alone(self, fn: Callable[..., Any], arguments: tuple[Any, ...]) -> "dict[str, float] | None":
        """Run one client and return seconds: start, import before and in it, compute, everything, exit."""
        pause(GAP)
        before = tasks.clock()
        stamp = self._caller.call(tasks.stamped, fn, *arguments)
        after = tasks.clock()
        if stamp.born is None:
            return None
        start, imports = _beginning(before, stamp.born, stamp.entered)
        return {
            "start": start,
            "import": imports,
            "imports": stamp.imports,
            "compute": stamp.computed,
            "all": after - before,
            "exit": _until_gone(stamp.pid) if self.contestant.isolation == FRESH else 0.0,
        }

    def noted(self) -> dict[str, Any] | None:
        return (super().noted() or {}) | {"phases": self._phases}

    def go_on(self, noted: dict[str, Any]) -> None:
        super().go_on(noted)
        self._phases = noted["phases"]  # which running clients alone, as a warm-up, measures again

    def measured(self) -> dict[str, Any]:
        return super().measured() | {"phases": self._phases}


def _beginning(asked: float, born: float, entered: float) -> tuple[float, float]:
    """Return the seconds until a worker was born, and from then until it entered the task.

    One that was born before has none of the first, and of the second the rest. Births are told in ticks: what
    is shorter is not told apart.
    """
    imports = max(0.0, entered - max(asked, born))
    if imports < TICK:
        imports = 0.0
    return (max(0.0, entered - asked - imports) if born > asked else 0.0), imports


def _phases(empty: list[Any], full: list[Any]) -> dict[str, float]:
    """Tell the phases: what a client needs beside computing and beyond starting is its transfer."""
    start, imports = (statistics.median(one[key] for one in empty) for key in ("start", "import"))
    compute, whole, leave, within = (
        statistics.median(one[key] for one in full) for key in ("compute", "all", "exit", "imports")
    )
    imports += within
    transfer = max(0.0, whole - compute - start - imports)
    return {"start": start, "import": imports, "transfer": transfer, "compute": compute, "exit": leave}


def _until_gone(pid: int, limit: float = 5.0) -> float:
    """Return the seconds until a process has ended."""
    began = tasks.clock()
    while tasks.clock() - began < limit:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                break
        except psutil.Error:
            break
        pause(0.0005)
    return tasks.clock() - began


class _Footprint(Rounds):
    """Rounds with a timeline beside them: their seconds are not those of the group *round*."""

    def open(self, stack: contextlib.ExitStack) -> None:
        if self.job.charges and not find_devices():
            stack.enter_context(environment(FEDEXEC_DEVICE=EMULATED))
        found: tuple[Device, ...] = find_devices() if self.job.charges or self.part.own else ()
        is_emulated = any(device.is_emulated for device in found)  # by us, or by whoever set the variable
        self._emulated = os.environ["FEDEXEC_DEVICE"] if is_emulated else None
        self._timeline = Timeline(found)
        self._over = threading.Event()
        self._looking = threading.Thread(target=self._look, daemon=True)
        self._looking.start()
        self._watching = contextlib.ExitStack()
        self._watching.callback(self._stop)
        stack.callback(self._last_look)
        self._round = 0
        super().open(stack)

    def setup(self) -> None:
        if self._results:
            pause(SETTLE)
            self._round += 1
            self._timeline.mark("round", self._round)
        super().setup()

    def noted(self) -> None:
        return None  # a timeline is that of one process

    def _look(self) -> None:
        """The timeline looks at the host seldom, so as not to disturb; here nothing else is measured."""
        while not self._over.wait(LOOK):
            self._timeline.mark("look")

    def _last_look(self) -> None:
        """When all workers are gone, and the device is still the same."""
        pause(SETTLE)
        self._over.set()
        self._looking.join()
        self._timeline.mark("shutdown")
        self._watching.close()

    def _stop(self) -> None:
        self._over.set()
        self._looking.join()
        self._timeline.close()

    def measured(self) -> dict[str, Any]:
        timeline = self._timeline
        told = timeline.as_dict()
        told["marks"] = [mark for mark in told["marks"] if mark["label"] != "look"]
        memory: dict[str, Any] = {
            "timeline": told,
            "host_peak_bytes": timeline.host.peak,
            "device": None,
            "device_total_bytes": None,
            "device_peak_bytes": None,
            "device_residual_bytes": None,
            "device_end_bytes": None,
        }
        for device in sorted(timeline.watched, key=lambda one: timeline.devices[one.uuid].peak or 0)[-1:]:
            memory |= {
                "device": device.name,
                "device_total_bytes": device.total_bytes(),
                "device_peak_bytes": timeline.devices[device.uuid].peak,
                "device_residual_bytes": timeline.residual_bytes(device.uuid, "round"),
                "device_end_bytes": timeline.residual_bytes(device.uuid, "shutdown"),
            }
        return super().measured() | {"memory": memory, "emulated": self._emulated}


class _Faults(Session):
    """One of four clients is killed, two at once: what becomes of the others, and of who comes after."""

    def open(self, stack: contextlib.ExitStack) -> None:
        self._caller = self.caller(stack)
        self._caller.call(tasks.nothing)
        self._found: dict[str, Any] | None = None

    def call(self) -> None:
        submit = self._caller.submit
        futures = [submit(tasks.wait, 0.3, 0), submit(tasks.die), submit(tasks.wait, 0.1, 2)]
        try:
            futures.append(submit(tasks.wait, 0.1, 3))
        except Exception:  # broken already, and says so to who submits
            futures.append(None)
        survived = sum(_result(futures[index]) == index for index in (0, 2, 3))
        if _result(futures[1]) is not None:
            raise RuntimeError("the client was not killed")
        try:
            usable = self._caller.call(tasks.wait, 0, True)
        except Exception:
            usable = False
        self._found = {"survived": survived, "others": 3, "usable": bool(usable)}

    def noted(self) -> None:
        return None  # there is but one call

    def measured(self) -> dict[str, Any]:
        return {"faults": self._found}


def _result(future: Any) -> Any:
    """Return what a client returned, or None where it failed."""
    try:
        return None if future is None else future.result()
    except Exception:
        return None
