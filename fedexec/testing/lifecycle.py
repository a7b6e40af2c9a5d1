"""Conformance tests of an executor's life: its start, the set-up of its workers, and its end."""

import gc
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from fedexec.errors import InitializerError, PreloadError
from fedexec.executor import Executor
from fedexec.interface import Capability
from fedexec.testing import tasks
from fedexec.testing.leaks import new_children
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE, Gate

__all__ = ["LifecycleConformance"]


class LifecycleConformance(Suite):
    """An executor starts, sets its workers up, and ends, no matter what ends it."""

    # ------------------------------------------------------------ shutdown

    def test_submit_after_shutdown_is_refused(self, create: Create) -> None:
        executor = create()
        executor.shutdown()
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(pow, 2, 5)

    def test_shutdown_can_be_called_again(self, create: Create) -> None:
        executor = create()
        future = executor.submit(pow, 2, 5)
        executor.shutdown(wait=False)
        executor.shutdown()
        executor.shutdown()
        executor.kill_workers()
        assert future.result(0) == 32

    def test_shutdown_waits_for_all_work(self, create: Create) -> None:
        executor = create()
        futures = [executor.submit(pow, 2, i) for i in range(12)]
        executor.shutdown(wait=True)
        assert [future.result(0) for future in futures] == [2**i for i in range(12)]

    def test_shutdown_without_waiting_lets_all_work_finish(self, create: Create, gate: Gate) -> None:
        executor = create()
        futures = [executor.submit(gate.enter, i) for i in range(6)]
        executor.shutdown(wait=False)
        assert not any(future.done() for future in futures)
        gate.open()
        assert [future.result(DEADLINE) for future in futures] == list(range(6))

    @pytest.mark.parametrize("waits", [True, False])
    def test_shutdown_can_cancel_what_waits(self, create: Create, gate: Gate, waits: bool) -> None:
        executor = create()
        futures = [executor.submit(gate.enter, i) for i in range(8)]
        gate.wait_for(2)
        executor.shutdown(wait=False, cancel_futures=True)
        assert all(future.cancelled() for future in futures[2:])
        gate.open()
        executor.shutdown(wait=waits)
        assert wait(futures, DEADLINE).not_done == set()
        assert [future.result(0) for future in futures[:2]] == [0, 1]

    def test_a_task_for_which_a_worker_is_free_has_begun_when_submit_returns(self, create: Create) -> None:
        executor = create(max_workers=2)
        before = sys.getswitchinterval()
        sys.setswitchinterval(DEADLINE)  # as on a busy machine: no other thread runs meanwhile
        try:
            futures = [executor.submit(pow, i, 2) for i in range(8)]
            executor.shutdown(wait=False, cancel_futures=True)
        finally:
            sys.setswitchinterval(before)
        assert [future.result(DEADLINE) for future in futures[:2]] == [0, 1]

    def test_a_cancelled_task_does_not_hold_up_shutdown(self, create: Create) -> None:
        executor = create(max_workers=1)
        executor.submit(int).result(DEADLINE)
        executor.submit(int).cancel()  # gh-94440
        executor.shutdown(wait=True)

    def test_a_with_block_waits_for_all_work(self, create: Create) -> None:
        with create() as executor:
            results = executor.map(abs, range(-5, 5))
        assert list(results) == [5, 4, 3, 2, 1, 0, 1, 2, 3, 4]
        with pytest.raises(RuntimeError):
            executor.submit(int)

    def test_an_executor_nobody_holds_finishes_its_work_and_ends(self, gate: Gate) -> None:
        before = self.alone()
        threads = threading.active_count()
        executor = self.new_executor()
        futures = [executor.submit(gate.enter, i) for i in range(6)]
        gate.wait_for(2)
        del executor
        gc.collect()
        gate.open()
        assert [future.result(DEADLINE) for future in futures] == list(range(6))
        tasks.poll(lambda: not new_children(before), "the processes ended")
        tasks.poll(lambda: threading.active_count() <= threads, "the threads ended")

    def test_an_executor_never_used_ends(self) -> None:
        before = self.alone()
        executor = self.new_executor()
        executor.shutdown()
        assert not new_children(before)
        executor = self.new_executor()
        del executor
        gc.collect()
        tasks.poll(lambda: not new_children(before), "the processes ended")

    def test_shutdown_races_with_submit(self, create: Create) -> None:
        executor = create()
        accepted = []

        def submit() -> None:
            with pytest.raises(RuntimeError, match="cannot schedule"):
                for number in itertools.count():  # until the executor refuses
                    accepted.append((number, executor.submit(tasks.add, number, 0)))

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        tasks.poll(lambda: len(accepted) > 4, "something was submitted")
        executor.shutdown(wait=True, cancel_futures=True)
        for thread in threads:
            thread.join()
        assert all(future.done() for _, future in accepted)
        assert all(future.result(0) == number for number, future in accepted if not future.cancelled())

    # ------------------------------------------------------------ set-up of workers

    def test_the_initializer_runs_where_tasks_run(self, create: Create) -> None:
        executor = create(initializer=tasks.initialize, initargs=("ready",))
        assert [executor.submit(tasks.initialized).result(DEADLINE) for _ in range(4)] == ["ready"] * 4

    def test_the_initializer_may_be_a_closure(self, create: Create) -> None:
        value = object.__name__
        executor = create(initializer=lambda: tasks.initialize(value))
        assert executor.submit(tasks.initialized).result(DEADLINE) == value

    def test_an_initializer_that_is_none_is_refused(self, create: Create) -> None:
        with pytest.raises(TypeError, match="initializer must be a callable"):
            create(initializer=3)

    def test_an_initializer_that_does_not_pickle_is_refused(self, create: Create) -> None:
        self.need(Capability.ISOLATED)
        with pytest.raises(TypeError, match="pickle"):
            create(initializer=print, initargs=(threading.Lock(),))

    def test_an_initializer_that_raises_breaks_the_executor(self, create: Create, gate: Gate) -> None:
        executor = create(initializer=tasks.fail_after, initargs=(gate,))
        futures = [executor.submit(pow, 2, 2) for _ in range(5)]
        gate.open()
        for future in futures:
            error = future.exception(DEADLINE)
            assert isinstance(error, InitializerError)
            assert isinstance(error, BrokenProcessPool)
            assert isinstance(error.__cause__, ValueError)
            assert "the initializer failed" in str(error)
        with pytest.raises(BrokenExecutor) as caught:
            executor.submit(pow, 2, 2)
        assert isinstance(caught.value.__cause__, ValueError)
        assert executor.stats().failed == 5
        executor.shutdown()

    def test_an_initializer_that_exits_breaks_the_executor(self, create: Create) -> None:
        executor = create(initializer=tasks.exit_with, initargs=(3,))
        error = executor.submit(pow, 2, 2).exception(DEADLINE)
        assert isinstance(error, InitializerError)
        assert isinstance(error.__cause__, SystemExit)

    def test_an_initializer_that_dies_fails_its_task(self, create: Create) -> None:
        self.need(Capability.SURVIVES_DEATH)
        executor = create(initializer=os._exit, initargs=(3,))
        assert isinstance(executor.submit(pow, 2, 2).exception(DEADLINE), BrokenExecutor)
        executor.shutdown()

    def test_the_preload_is_imported_before_the_task(
        self, create: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "heavy_module.py").write_text("import os\npid = os.getpid()\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        executor = create(preload=["heavy_module"])
        assert executor.submit(lambda: "heavy_module" in __import__("sys").modules).result(DEADLINE)
        monkeypatch.delitem(sys.modules, "heavy_module", raising=False)

    @pytest.mark.parametrize("complaint", ["import no_such_module_at_all", "raise SystemExit(3)", "1 / 0"])
    def test_a_preload_that_fails_is_named(
        self, create: Create, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, complaint: str
    ) -> None:
        (tmp_path / "broken_module.py").write_text(complaint)
        monkeypatch.syspath_prepend(str(tmp_path))
        before = self.alone()
        executor = None
        # raised at once or, if each worker imports the module, by the future
        with pytest.raises(PreloadError) as caught:
            executor = create(preload=["json", "broken_module"])
            executor.submit(pow, 2, 2).result(DEADLINE)
        assert caught.value.module == "broken_module"
        assert complaint in caught.value.traceback
        if executor is not None:
            with pytest.raises(PreloadError):
                executor.submit(pow, 2, 2)
            executor.shutdown()
        assert not new_children(before)

    def test_workers_are_held_to_their_threads(self, create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
        self.need(Capability.ISOLATED)
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        monkeypatch.setenv("OMP_NUM_THREADS", "77")
        ours = create(threads_per_worker=3).submit(tasks.environment, *names)
        assert ours.result(DEADLINE) == ["3", "3", "3"]
        assert tasks.environment("OMP_NUM_THREADS") == ["77"]

    def test_a_limit_the_user_has_set_stays(self, create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "77")
        assert create().submit(tasks.environment, "OMP_NUM_THREADS").result(DEADLINE) == ["77"]

    def test_every_task_has_a_process_of_its_own(self, executor: Executor) -> None:
        self.need(Capability.FRESH_PROCESS)
        pids = [future.result(DEADLINE) for future in [executor.submit(os.getpid) for _ in range(8)]]
        assert len({*pids, os.getpid()}) == 9

    def test_tasks_do_not_run_in_the_callers_process(self, executor: Executor) -> None:
        pid = executor.submit(os.getpid).result(DEADLINE)
        assert (pid != os.getpid()) is self.promises(Capability.ISOLATED)

    def test_workers_import_nothing_heavy_by_themselves(self, executor: Executor) -> None:
        self.need(Capability.ISOLATED)
        heavy = {"flwr", "torch", "numpy", "pytest"}
        loaded: Callable[[], set[str]] = lambda: heavy & set(__import__("sys").modules)  # noqa: E731
        assert executor.submit(loaded).result(DEADLINE) == set()
        assert executor.submit(tasks.initialized).result(DEADLINE) is None
