"""Tests of deaths of a backend's helper processes: a template, a Manager, waiting workers."""

import contextlib
import sys
from pathlib import Path

import psutil
import pytest

from fedexec import _registry
from fedexec.errors import WorkerDiedError
from fedexec.interface import Capability
from fedexec.testing import tasks
from fedexec.testing.leaks import living, new_children
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE, Gate

__all__ = ["HelperDeaths"]


class HelperDeaths(Suite):
    """Any helper process may be killed; no later task is lost."""

    @pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
    def test_a_worker_needs_no_more_descriptors_than_its_backend_declares(self, create: Create) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        executor = create(max_workers=4)
        futures = [executor.submit(abs, number) for number in range(32)]
        most = 0
        while not all(future.done() for future in futures):
            most = max(most, len(list(Path("/proc/self/fd").iterdir())))
        declared = _registry.load(executor.settings.backend).descriptors_per_worker
        # for the template, the relay of stderr, and a tracker; or for the client of an engine
        others = 40 if self.promises(Capability.REMOTE) else 12
        assert most - before <= 4 * declared + others

    def test_no_idle_process_is_indispensable(self, create: Create) -> None:
        """Idle workers, a template, a Manager: each may be killed between two tasks."""
        self.need(Capability.SURVIVES_DEATH)
        before = self.alone()
        executor = create()
        assert list(executor.map(abs, range(4))) == [0, 1, 2, 3]
        for victim in sorted(new_children(before), key=lambda process: process.pid):
            tasks.poll(lambda it=victim: not self._kill_all({it}), "it was killed")  # type: ignore[misc]
            assert list(executor.map(abs, range(6))) == list(range(6)), f"{victim} was indispensable"
        tasks.poll(lambda: not self._kill_all(new_children(before)), "all were killed at once")
        futures = [executor.submit(abs, number) for number in range(6)]
        assert [future.result(DEADLINE) for future in futures] == list(range(6))

    @staticmethod
    def _kill_all(processes: set[psutil.Process]) -> set[psutil.Process]:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return living(processes)

    def test_a_killed_helper_does_not_hang_what_runs(self, create: Create, gate: Gate) -> None:
        """Tasks that run meanwhile may fail with the right error; later tasks must not fail."""
        self.need(Capability.SURVIVES_DEATH)
        before = self.alone()
        executor = create()
        running = [executor.submit(gate.enter, i) for i in range(2)]
        workers = set(gate.wait_for(2))
        for helper in new_children(before):
            if helper.pid not in workers:
                self._kill_all({helper})
        gate.open()
        for number, future in enumerate(running):
            error = future.exception(DEADLINE)
            assert error is None or isinstance(error, WorkerDiedError)
            assert error is not None or future.result() == number
        assert list(executor.map(abs, range(6))) == list(range(6))

    def test_processes_killed_again_and_again_lose_nothing_that_is_retried(self, create: Create) -> None:
        self.need(Capability.SURVIVES_DEATH)
        before = self.alone()
        executor = create(retries=100)
        futures = [executor.submit(tasks.add, i, 0) for i in range(40)]
        for done in range(0, 35, 7):
            futures[done].result(DEADLINE)  # The executor works again.
            self._kill_all(new_children(before))
        assert [future.result(DEADLINE) for future in futures] == list(range(40))
