"""Tests of leaks: what tasks leave in a worker does not accumulate, no matter how the backend prevents it."""

import pytest

from fedexec.interface import Capability
from fedexec.testing import bad_tasks, tasks
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE, Gate

__all__ = ["MemoryDeaths"]

MIB = 1024**2


class MemoryDeaths(Suite):
    """Workers that leak are replaced in time."""

    def _need_bounded_workers(self) -> None:
        if not (self.promises(Capability.RECYCLES) or self.promises(Capability.FRESH_PROCESS)):
            pytest.skip(f"backend {self.backend!r} promises neither RECYCLES nor FRESH_PROCESS")

    def test_no_task_starts_in_a_worker_above_the_limit(self, create: Create) -> None:
        self._need_bounded_workers()
        executor = create(memory_limit="150MiB")
        futures = [executor.submit(bad_tasks.leak, 40 * MIB, i) for i in range(30)]
        answers = [future.result(DEADLINE) for future in futures]
        assert [value for value, _, _ in answers] == list(range(30))
        assert max(at_start for _, _, at_start in answers) <= 150 * MIB
        if self.promises(Capability.RECYCLES):
            assert executor.stats().restarts["host memory"] >= 5
            assert len({pid for _, pid, _ in answers}) < 30, "a worker below the limit is kept"

    def test_the_first_task_counts(self, create: Create) -> None:
        self.need(Capability.RECYCLES)
        executor = create(max_workers=1, memory_limit="150MiB")
        first, second, third = (executor.submit(bad_tasks.leak, size * MIB) for size in (200, 1, 1))
        assert first.result(DEADLINE)[1] != second.result(DEADLINE)[1]
        assert second.result()[1] == third.result(DEADLINE)[1]
        assert second.result()[2] < 150 * MIB
        assert executor.stats().restarts == {"host memory": 1}

    def test_a_worker_below_the_limit_is_kept(self, create: Create) -> None:
        self.need(Capability.RECYCLES)
        executor = create(max_workers=1, memory_limit="1GiB")
        assert len({executor.submit(bad_tasks.leak, MIB).result(DEADLINE)[1] for _ in range(5)}) == 1
        assert executor.stats().restarts == {}

    def test_a_task_that_fails_counts_too(self, create: Create) -> None:
        self.need(Capability.RECYCLES)
        executor = create(max_workers=1, memory_limit="150MiB")
        assert isinstance(executor.submit(bad_tasks.leak_and_fail, 200 * MIB).exception(DEADLINE), ValueError)
        assert executor.submit(bad_tasks.resident).result(DEADLINE) < 150 * MIB
        assert executor.stats().restarts == {"host memory": 1}

    def test_a_worker_that_is_replaced_does_not_disturb_its_neighbour(
        self, create: Create, gate: Gate
    ) -> None:
        self.need(Capability.RECYCLES)
        executor = create(memory_limit="150MiB")
        held = executor.submit(tasks.pid_after, gate)
        (neighbour,) = gate.wait_for(1)
        leaking = [executor.submit(bad_tasks.leak, 200 * MIB) for _ in range(4)]
        pids = {future.result(DEADLINE)[1] for future in leaking}
        assert len(pids) == 4
        assert neighbour not in pids
        gate.open()
        assert held.result(DEADLINE) == neighbour
        assert executor.stats().restarts == {"host memory": 4}
        assert neighbour in {executor.submit(tasks.pid_after, gate).result(DEADLINE) for _ in range(2)}
