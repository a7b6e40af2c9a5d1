"""Conformance tests of what is measured for each task, and of the counts for all of them."""

import os
import time

import pytest

from fedexec.executor import Executor
from fedexec.interface import Capability
from fedexec.memory import host
from fedexec.testing import bad_tasks, tasks
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE, Gate

__all__ = ["UsageConformance"]

MIB = 1024**2


class UsageConformance(Suite):
    """A future reports the cost of its task; an executor counts its tasks."""

    def test_usage_says_where_and_how_long_a_task_ran(self, executor: Executor) -> None:
        future = executor.submit(time.sleep, 0.2)
        future.result(DEADLINE)
        usage = future.usage
        assert usage is not None
        assert 0.2 <= usage.wall_seconds < 5
        assert 0 <= usage.cpu_seconds < 0.2
        pid = executor.submit(os.getpid)
        assert pid.result(DEADLINE) == (pid.usage and pid.usage.worker_pid)

    def test_usage_is_known_of_a_task_that_failed(self, executor: Executor) -> None:
        future = executor.submit(tasks.raise_new, ValueError)
        future.exception(DEADLINE)
        assert future.usage is not None

    def test_usage_shows_the_peak_of_memory(self, executor: Executor) -> None:
        self.need(Capability.ISOLATED)
        _need_a_peak()
        future = executor.submit(bad_tasks.allocate, 50 * MIB)
        held = future.result(DEADLINE)
        assert future.usage is not None
        peak, end = future.usage.peak_host_bytes, future.usage.end_host_bytes
        assert peak is not None and end is not None
        assert held - MIB <= peak < held + 50 * MIB
        assert 0 < end <= peak - 40 * MIB

    def test_usage_does_not_show_the_peak_of_an_earlier_task(self, create: Create) -> None:
        self.need(Capability.ISOLATED)
        _need_a_peak()
        executor = create(max_workers=1)
        executor.submit(bad_tasks.allocate, 100 * MIB).result(DEADLINE)
        future = executor.submit(bad_tasks.resident)
        now = future.result(DEADLINE)
        assert future.usage is not None and future.usage.peak_host_bytes is not None
        assert future.usage.peak_host_bytes < now + 20 * MIB

    def test_stats_count_every_task_once(self, create: Create, gate: Gate) -> None:
        executor = create(max_workers=1)
        first = executor.submit(gate.enter)
        futures = [executor.submit(pow, 2, 2), executor.submit(divmod, 1, 0), executor.submit(pow, 2, 3)]
        futures[2].cancel()
        gate.wait_for(1)
        assert (executor.stats().running, executor.stats().queued) == (1, 3)
        gate.open()
        executor.shutdown()
        first.result(0)
        stats = executor.stats().as_dict()
        del stats["learning"]
        assert stats == dict.fromkeys(stats, 0) | {
            "submitted": 4, "succeeded": 2, "failed": 1, "cancelled": 1, "restarts": {},
        }  # fmt: skip


def _need_a_peak() -> None:
    if not host.reset_peak():
        pytest.skip("the system does not say how much memory a process held at most")
