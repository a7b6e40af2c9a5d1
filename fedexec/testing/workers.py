"""Tests of deaths of workers: a dead worker's task fails with a precise error, and no other does."""

import contextlib
import functools
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import psutil
import pytest

import fedexec
from fedexec._scheduling.futures import Future
from fedexec.errors import TaskTimeoutError, WorkerDiedError, WorkerError
from fedexec.executor import Executor
from fedexec.interface import Capability
from fedexec.testing import bad_tasks, tasks
from fedexec.testing.leaks import living, new_children
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE, Gate, poll

__all__ = ["WorkerDeaths"]


class WorkerDeaths(Suite):
    """A worker's death fails one task, with a precise error, and no other task is affected."""

    # ------------------------------------------------------------ the task of the worker

    @pytest.mark.parametrize(
        ("task", "args", "exitcode"),
        [
            (os._exit, (7,), 7),
            (os._exit, (0,), 0),
            (bad_tasks.kill_self, (), -signal.SIGKILL),
            (bad_tasks.kill_self, (signal.SIGTERM,), -signal.SIGTERM),
            (tasks.segfault, (), -signal.SIGSEGV),
        ],
        ids=["exit 7", "exit 0", "SIGKILL", "SIGTERM", "SIGSEGV"],
    )
    def test_a_dead_worker_is_reported_with_how_it_ended(
        self, executor: Executor, task: Callable[..., Any], args: tuple[Any, ...], exitcode: int
    ) -> None:
        self.need(Capability.SURVIVES_DEATH)
        error = executor.submit(task, *args).exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert isinstance(error, WorkerError)
        assert isinstance(error, BrokenProcessPool)
        assert (error.exitcode, error.task) == (exitcode, task.__qualname__)
        assert error.signal == (-exitcode if exitcode < 0 else None)
        assert error.pid not in (None, os.getpid())
        assert str(error.pid) in str(error)
        copy = pickle.loads(pickle.dumps(error))
        assert (copy.pid, copy.exitcode, copy.task, str(copy)) == (
            error.pid, error.exitcode, error.task, str(error),
        )  # fmt: skip
        assert executor.submit(pow, 2, 3).result(DEADLINE) == 8

    def test_the_pid_is_that_of_the_worker_that_died(self, create: Create, gate: Gate) -> None:
        self.need(Capability.SURVIVES_DEATH)
        future = create().submit(bad_tasks.die_at, gate)
        (pid,) = gate.wait_for(1)
        gate.open()
        error = future.exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert (error.pid, error.signal) == (pid, signal.SIGKILL)
        assert future.usage is None

    def test_a_worker_killed_from_outside_is_reported(self, create: Create, gate: Gate) -> None:
        self.need(Capability.SURVIVES_DEATH)
        executor = create()
        future = executor.submit(gate.enter)
        (pid,) = gate.wait_for(1)
        os.kill(pid, signal.SIGKILL)
        error = future.exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert (error.pid, error.signal) == (pid, signal.SIGKILL)
        assert executor.stats().worker_deaths == 1

    def test_a_worker_that_dies_over_its_answer_is_reported(self, create: Create) -> None:
        self.need(Capability.SURVIVES_DEATH)
        executor = create()
        error = executor.submit(bad_tasks.die_answering).exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert error.signal == signal.SIGKILL
        assert executor.submit(pow, 2, 3).result(DEADLINE) == 8

    # ------------------------------------------------------------ all other tasks

    def test_a_death_fails_neither_what_runs_nor_what_waits(self, create: Create, gate: Gate) -> None:
        self.need(Capability.SURVIVES_DEATH)
        executor = create(max_workers=4)
        running = [executor.submit(gate.enter, i) for i in range(3)]
        gate.wait_for(3)
        dying = [executor.submit(bad_tasks.kill_self) for _ in range(3)]
        waiting = [executor.submit(tasks.add, i, 0) for i in range(20)]
        assert all(isinstance(future.exception(DEADLINE), WorkerDiedError) for future in dying)
        assert not any(future.done() for future in running)
        gate.open()
        assert [future.result(DEADLINE) for future in running] == [0, 1, 2]
        assert [future.result(DEADLINE) for future in waiting] == list(range(20))
        stats = executor.stats()
        assert (stats.worker_deaths, stats.succeeded, stats.failed) == (3, 23, 3)

    def test_every_second_task_dies_and_the_others_answer(self, create: Create) -> None:
        self.need(Capability.SURVIVES_DEATH)
        executor = create(max_workers=3)
        futures: list[Future[Any]] = []
        for number in range(24):
            futures.append(executor.submit(abs, number) if number % 2 else executor.submit(os._exit, number))
        for number, future in enumerate(futures):
            if number % 2:
                assert future.result(DEADLINE) == number
            else:
                error = future.exception(DEADLINE)
                assert isinstance(error, WorkerDiedError)
                assert error.exitcode == number

    def test_a_death_tells_the_last_that_was_written_to_stderr(self, create: Create) -> None:
        self.need(Capability.SURVIVES_DEATH)
        if sys.platform != "linux":
            pytest.skip("stderr is not recorded here")
        executor = create()
        error = executor.submit(bad_tasks.complain_and_die, 3).exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert error.stderr.splitlines() == ["complaint 0", "complaint 1", "complaint 2"]
        assert error.stderr in "".join(traceback.format_exception(error))
        error = executor.submit(tasks.segfault).exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert "Segmentation fault" in error.stderr
        assert "in segfault" in error.stderr
        assert "complaint" not in error.stderr

    def test_what_a_task_writes_to_stderr_is_passed_on_before_its_result(
        self, create: Create, capfd: pytest.CaptureFixture[str]
    ) -> None:
        executor = create(max_workers=1)
        for count in (1, 0, 2, 200):
            executor.submit(bad_tasks.complain, count).result(DEADLINE)
            lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("complaint")]
            assert lines == [f"complaint {number}" for number in range(count)]

    def test_a_worker_is_heard_whatever_its_tasks_before_did_to_stderr(self, create: Create) -> None:
        self.need(Capability.SURVIVES_DEATH)
        if sys.platform != "linux":
            pytest.skip("stderr is not recorded here")
        executor = create(max_workers=1, max_tasks_per_child=10)
        for fn in (
            bad_tasks.silence_stderr,
            functools.partial(bad_tasks.complain, 5),
            bad_tasks.silence_stderr,
        ):
            executor.submit(fn).result(DEADLINE)
        error = executor.submit(bad_tasks.complain_and_die, 1).exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert error.stderr.splitlines() == ["complaint 0"]

    def test_a_task_that_does_not_heed_sigterm_is_killed(self, create: Create) -> None:
        self.need(Capability.KILLS_ONE)
        timeout = self._ample_timeout(create)
        error = create(timeout=timeout).submit(bad_tasks.hang_for_good).exception(DEADLINE)
        assert isinstance(error, TaskTimeoutError)

    # ------------------------------------------------------------ retries

    def test_a_task_whose_worker_died_is_run_again(self, create: Create, tmp_path: Path) -> None:
        self.need(Capability.SURVIVES_DEATH)
        executor = create(retries=1)
        assert executor.submit(bad_tasks.die_once, tmp_path / "marker").result(DEADLINE) == 1
        stats = executor.stats()
        assert (stats.retries, stats.worker_deaths, stats.succeeded, stats.failed) == (1, 1, 1, 0)

    def test_a_task_is_run_again_no_more_often_than_asked(self, create: Create, tmp_path: Path) -> None:
        self.need(Capability.SURVIVES_DEATH)
        marker = tmp_path / "marker"
        error = create(retries=2).submit(bad_tasks.die_always, marker).exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert marker.read_text() == "xxx"

    def test_a_task_that_raises_is_not_run_again(self, create: Create) -> None:
        executor = create(retries=3)
        assert isinstance(executor.submit(divmod, 1, 0).exception(DEADLINE), ZeroDivisionError)
        assert executor.stats().retries == 0

    # ------------------------------------------------------------ options of single tasks

    def test_a_task_has_options_of_its_own(self, create: Create, tmp_path: Path) -> None:
        self.need(Capability.KILLS_ONE)
        executor = create(timeout=DEADLINE)
        view = executor.with_options(retries=1, tag="client 7")
        assert view.submit(bad_tasks.die_once, tmp_path / "first").result(DEADLINE) == 1
        error = executor.submit(bad_tasks.die_once, tmp_path / "second").exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert error.task == "die_once"
        error = (
            view.with_options(timeout=self._ample_timeout(create)).submit(bad_tasks.hang).exception(DEADLINE)
        )
        assert isinstance(error, TaskTimeoutError)
        assert error.task == "hang [client 7]"
        assert executor.stats().retries == view.stats().retries == 1

    def test_a_view_keeps_its_executor_alive(self) -> None:
        view = type(self).new_executor().with_options(tag="view")
        try:
            assert view.submit(pow, 2, 3).result(DEADLINE) == 8
        finally:
            view.shutdown()

    def test_what_must_not_run_twice_is_not_run_again(self, create: Create, tmp_path: Path) -> None:
        self.need(Capability.SURVIVES_DEATH)
        executor = create(retries=3)
        markers = [tmp_path / "1", tmp_path / "2", tmp_path / "3"]
        futures = [
            executor.submit(fedexec.once(functools.partial(bad_tasks.die_always, markers[0]))),
            executor.submit(
                functools.partial(fedexec.once(functools.partial(bad_tasks.die_always)), markers[1])
            ),
        ]
        for future in futures:
            assert isinstance(future.exception(DEADLINE), WorkerDiedError)
        each = executor.map(fedexec.once(functools.partial(bad_tasks.die_always)), [markers[2]], chunksize=2)
        with pytest.raises(WorkerDiedError):
            next(each)
        assert [marker.read_text() for marker in markers] == ["x", "x", "x"]

    # ------------------------------------------------------------ deadlines

    def test_a_task_that_outlives_its_timeout_is_ended_alone(self, create: Create) -> None:
        self.need(Capability.KILLS_ONE)
        timeout = self._ample_timeout(create)
        executor = create(timeout=timeout, retries=1)
        ended: list[float] = []
        start = time.monotonic()
        slow = executor.submit(bad_tasks.hang)
        slow.add_done_callback(lambda future: ended.append(time.monotonic() - start))
        others = [executor.submit(tasks.add, i, 0) for i in range(20)]
        assert [other.result(DEADLINE) for other in others] == list(range(20))
        error = slow.exception(DEADLINE)
        tasks.poll(lambda: ended, "the callback was called")
        assert timeout <= ended[0] < timeout + 8
        assert isinstance(error, TaskTimeoutError)
        assert isinstance(error, TimeoutError)
        assert isinstance(error, WorkerError)
        assert (error.timeout, error.task) == (timeout, "hang")
        assert error.pid is not None
        if sys.platform == "linux":
            assert "in hang" in error.stderr
            assert "in hang" in pickle.loads(pickle.dumps(error)).stderr
        assert error.pid not in {process.pid for process in new_children()}
        assert executor.submit(pow, 2, 2).result(DEADLINE) == 4
        stats = executor.stats()
        assert (stats.timeouts, stats.worker_deaths, stats.retries) == (1, 0, 0)

    @staticmethod
    def _ample_timeout(create: Create) -> float:
        """Return a number of seconds in which a worker certainly starts, however slow this machine is."""
        start = time.monotonic()
        create().submit(int).result(DEADLINE)
        return 1 + 4 * (time.monotonic() - start)

    def test_a_timeout_shorter_than_the_start_of_a_worker_holds(self, create: Create) -> None:
        self.need(Capability.KILLS_ONE)
        executor = create(timeout=0.001)
        for future in [executor.submit(bad_tasks.hang) for _ in range(6)]:
            assert isinstance(future.exception(DEADLINE), TaskTimeoutError)

    def test_what_a_task_started_dies_with_it(self, create: Create, tmp_path: Path) -> None:
        self.need(Capability.KILLS_ONE)
        note = tmp_path / "grandchild"
        future = create(timeout=self._ample_timeout(create)).submit(bad_tasks.hang_with_grandchild, note)
        tasks.poll(note.exists, "the task started a process")
        grandchild = psutil.Process(int(note.read_text()))
        assert isinstance(future.exception(DEADLINE), TaskTimeoutError)
        tasks.poll(lambda: not living([grandchild]), "the grandchild died")

    def test_what_a_task_left_running_ends_with_its_worker(self, create: Create) -> None:
        self.need(Capability.ISOLATED)
        executor = create()
        left = []
        for pid in executor.submit(bad_tasks.leave_behind, 3).result(DEADLINE):
            with contextlib.suppress(psutil.NoSuchProcess):  # The process has ended already.
                left.append(psutil.Process(pid))
        executor.shutdown()
        tasks.poll(lambda: not living(left), "the processes that the task left have ended")

    # ------------------------------------------------------------ end

    def test_one_task_is_ended_alone_and_not_run_again(self, create: Create, gate: Gate) -> None:
        self.need(Capability.KILLS_ONE)
        executor = create(retries=5)
        ended, other = executor.submit(bad_tasks.hang), executor.submit(gate.enter, "other")
        waiting = executor.submit(gate.enter, "waiting")
        gate.wait_for(1)
        executor.end(waiting)
        executor.end(ended)
        assert isinstance(ended.exception(DEADLINE), WorkerDiedError)
        assert waiting.cancelled()
        gate.open()
        assert other.result(DEADLINE) == "other"
        executor.end(other)
        assert executor.submit(tasks.add, 1, 2).result(DEADLINE) == 3
        assert executor.stats().retries == 0

    # ------------------------------------------------------------ kill_workers

    def test_kill_workers_ends_what_runs_and_cancels_what_waits(self, create: Create, gate: Gate) -> None:
        self.need(Capability.KILLS_ONE)
        before = self.alone()
        executor = create(retries=5)
        running = [executor.submit(gate.enter) for _ in range(2)]
        waiting = [executor.submit(gate.enter) for _ in range(5)]
        pids = gate.wait_for(2)
        start = time.monotonic()
        executor.kill_workers()
        assert time.monotonic() - start < 5
        errors = [future.exception(0) for future in running]
        assert {error.pid for error in errors if isinstance(error, WorkerDiedError)} == set(pids)
        for future in waiting:
            with pytest.raises(CancelledError):
                future.result(0)
        assert not new_children(before)
        with pytest.raises(RuntimeError, match="after shutdown"):
            executor.submit(int)

    def test_kill_workers_hits_workers_that_are_just_starting(self, create: Create) -> None:
        self.need(Capability.KILLS_ONE)
        before = self.alone()
        executor = create(max_workers=4)
        futures = [executor.submit(bad_tasks.hang) for _ in range(4)]
        executor.kill_workers()
        assert all(future.done() for future in futures)
        assert not new_children(before)

    def test_terminate_workers_lets_tasks_clean_up(self, create: Create, temp: Path) -> None:
        self.need(Capability.KILLS_ONE)
        before = self.alone()
        executor = create(max_workers=2)
        polite = executor.submit(bad_tasks.clean_up_on_sigterm, temp / "begun", temp / "cleaned up")
        stubborn = executor.submit(bad_tasks.hang_for_good)
        waiting = executor.submit(int)
        poll((temp / "begun").exists, "a task runs")
        executor.terminate_workers()
        assert (temp / "cleaned up").exists()
        assert isinstance(polite.exception(0), WorkerDiedError | SystemExit)
        assert isinstance(stubborn.exception(0), WorkerDiedError)
        assert waiting.cancelled()
        assert not new_children(before)

    def test_kill_workers_helps_a_shutdown_that_waits(self, create: Create, gate: Gate) -> None:
        self.need(Capability.KILLS_ONE)
        executor = create()
        future = executor.submit(gate.enter)
        gate.wait_for(1)
        waiting = threading.Thread(target=executor.shutdown)
        waiting.start()
        executor.kill_workers()
        waiting.join(DEADLINE)
        assert not waiting.is_alive()
        assert isinstance(future.exception(0), WorkerDiedError)
