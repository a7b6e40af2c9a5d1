"""Submit, cancel, end, shut down, in any order: each future resolves once, with the truth, and is counted."""

import itertools
import threading
from collections import Counter
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, multiple, precondition, rule

import fedexec
from fedexec.errors import WorkerDiedError
from fedexec.interface import Capability
from fedexec.testing import bad_tasks, tasks


class ExecutorMachine(RuleBasedStateMachine):
    """An executor, the futures it gave out, and what each of them may turn out to be."""

    backend = ""
    futures = Bundle("futures")
    resolved: Counter[fedexec.Future]

    @initialize(retries=st.integers(0, 1))
    def create(self, retries):
        self.executor = fedexec.create_executor(self.backend, max_workers=2, retries=retries)
        self.dies = Capability.SURVIVES_DEATH in self.executor.capabilities
        self.numbers, self.given, self.interfered = itertools.count(), {}, set()
        self.resolved, self.lock, self.is_open = Counter(), threading.Lock(), True

    def note(self, future):
        with self.lock:
            self.resolved[future] += 1

    def give(self, fn, args, expected):
        future = self.executor.submit(fn, *args)
        self.given[future] = expected
        future.add_done_callback(self.note)
        return future

    @precondition(lambda self: self.is_open)
    @rule(target=futures, count=st.integers(1, 4))
    def submit(self, count):
        numbers = [next(self.numbers) for _ in range(count)]
        return multiple(*[self.give(tasks.add, (number, 1), number + 1) for number in numbers])

    @precondition(lambda self: self.is_open)
    @rule(target=futures)
    def submit_what_raises(self):
        return self.give(divmod, (1, 0), ZeroDivisionError)

    @precondition(lambda self: self.is_open and self.dies)
    @rule(target=futures)
    def submit_what_dies(self):
        return self.give(bad_tasks.kill_self, (), WorkerDiedError)

    @rule(future=futures)
    def cancel(self, future):
        if future.cancel():
            assert future.cancelled()
            self.interfered.add(future)

    @rule(future=futures)
    def end(self, future):
        self.interfered.add(future)
        self.executor.end(future)

    @rule(future=futures)
    def wait(self, future):
        self.check(future)

    @precondition(lambda self: self.is_open)
    @rule(cancel=st.booleans())
    def shut_down(self, cancel):
        self.executor.shutdown(wait=False, cancel_futures=cancel)
        self.is_open = False
        if cancel:
            self.interfered.update(self.given)

    @precondition(lambda self: not self.is_open)
    @rule()
    def submit_too_late(self):
        with pytest.raises(RuntimeError):
            self.executor.submit(int)

    def check(self, future):
        expected = self.given[future]
        if future in self.interfered and (future.cancelled() or not future.done()):
            tasks.poll(future.done, "it resolved")
        if future.cancelled():
            assert future in self.interfered
            return
        error = future.exception(tasks.DEADLINE)
        if future in self.interfered and isinstance(error, WorkerDiedError):
            return
        assert (type(error) if error else future.result()) == expected

    def teardown(self):
        if not hasattr(self, "executor"):
            return
        self.executor.shutdown()
        for future in self.given:
            self.check(future)
        stats = self.executor.stats()
        outcomes = Counter(
            "cancelled" if future.cancelled() else "failed" if future.exception() else "succeeded"
            for future in self.given
        )
        assert (stats.succeeded, stats.failed, stats.cancelled) == (
            outcomes["succeeded"], outcomes["failed"], outcomes["cancelled"],
        )  # fmt: skip
        assert (stats.submitted, stats.running, stats.queued) == (len(self.given), 0, 0)
        assert self.resolved == dict.fromkeys(self.given, 1)


@pytest.mark.thorough_but("standby", "inline")
@pytest.mark.parametrize("backend", ["inline", "process", "pool", "loky", "standby"])
def test_every_future_resolves_once_whatever_is_done(backend):
    pytest.importorskip("loky" if backend == "loky" else "fedexec")
    machine: Any = type("Machine", (ExecutorMachine,), {"backend": backend})
    machine.TestCase.settings = settings(
        max_examples=5, stateful_step_count=15, deadline=None, derandomize=True,
        suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    machine.TestCase("runTest").runTest()
