"""Conformance tests of calls: arguments, results, futures, callbacks, and references that must be dropped."""

import concurrent.futures
import itertools
import os
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future as StandardFuture
from concurrent.futures.process import _RemoteTraceback as RemoteTraceback
from typing import Any

import pytest

from fedexec._scheduling.futures import Future
from fedexec.executor import Executor
from fedexec.interface import Capability
from fedexec.testing import tasks
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE, Gate

__all__ = ["CallConformance"]

MIB = 1024**2


class CallConformance(Suite):
    """An executor calls functions as :class:`concurrent.futures.Executor` does."""

    # ------------------------------------------------------------ submit

    def test_submit_returns_a_future_of_the_result(self, executor: Executor) -> None:
        future = executor.submit(pow, 2, 8)
        assert isinstance(future, StandardFuture)
        assert future.result(DEADLINE) == 256
        assert future.exception() is None

    def test_submit_passes_positional_and_keyword_arguments(self, executor: Executor) -> None:
        assert executor.submit(tasks.add, 2, y=8).result(DEADLINE) == 10

    def test_submit_leaves_every_keyword_to_the_function(self, executor: Executor) -> None:
        future = executor.submit(tasks.capture, 1, self=2, fn=3, task=4, timeout=5)
        assert future.result(DEADLINE) == ((1,), {"self": 2, "fn": 3, "task": 4, "timeout": 5})

    def test_submit_takes_the_function_by_position_only(self, executor: Executor) -> None:
        with pytest.raises(TypeError):
            executor.submit(fn=tasks.capture, arg=1)  # type: ignore[call-arg]

    def test_none_is_a_result(self, executor: Executor) -> None:
        future = executor.submit(print, end="")
        assert future.result(DEADLINE) is None
        assert future.exception() is None

    def test_an_exception_object_can_be_a_result(self, executor: Executor) -> None:
        result = executor.submit(tasks.make, KeyError).result(DEADLINE)
        assert isinstance(result, KeyError)

    def test_twenty_megabytes_travel_both_ways(self, executor: Executor) -> None:
        data = os.urandom(MIB) * 20
        assert executor.submit(tasks.capture, data).result(DEADLINE) == ((data,), {})

    def test_threads_may_submit_at_the_same_time(self, executor: Executor) -> None:
        start = threading.Barrier(8)
        results: dict[int, list[int]] = {}

        def submit(number: int) -> None:
            start.wait()
            futures = [executor.submit(tasks.add, number * 1000, i) for i in range(10)]
            results[number] = [future.result(DEADLINE) for future in futures]

        threads = [threading.Thread(target=submit, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == {number: [number * 1000 + i for i in range(10)] for number in range(8)}

    def test_as_many_tasks_run_at_once_as_there_are_workers(self, create: Create, gate: Gate) -> None:
        executor = create(max_workers=3)
        futures = [executor.submit(gate.enter, i) for i in range(4)]
        gate.wait_for(3)
        stats = executor.stats()
        assert (stats.running, stats.queued) == (3, 1)
        assert not futures[3].running()
        gate.open()
        assert [future.result(DEADLINE) for future in futures] == [0, 1, 2, 3]
        assert len(gate.arrived()) == 4

    # ------------------------------------------------------------ map

    @pytest.mark.parametrize("chunksize", [1, 3, 100])
    def test_map_keeps_the_order(self, executor: Executor, chunksize: int) -> None:
        results = executor.map(pow, range(10), range(10), chunksize=chunksize)
        assert list(results) == list(map(pow, range(10), range(10)))

    def test_map_stops_at_the_shortest_iterable(self, executor: Executor) -> None:
        assert list(executor.map(tasks.add, [1, 2, 3], [10, 20])) == [11, 22]
        assert list(executor.map(tasks.add, [], [])) == []

    @pytest.mark.parametrize("chunksize", [0, -1])
    def test_map_refuses_a_chunksize_below_one(self, executor: Executor, chunksize: int) -> None:
        with pytest.raises(ValueError, match="chunksize"):
            executor.map(pow, [1], [1], chunksize=chunksize)

    def test_map_raises_an_exception_at_its_position(self, executor: Executor) -> None:
        results = executor.map(divmod, [1, 1, 1, 1], [2, 3, 0, 5])
        assert next(results) == (0, 1)
        assert next(results) == (0, 1)
        with pytest.raises(ZeroDivisionError):
            next(results)

    def test_map_raises_timeout_error_after_what_was_ready(self, executor: Executor, gate: Gate) -> None:
        results = executor.map(tasks.enter_if, [gate] * 3, [False, False, True], timeout=1)
        assert [next(results), next(results)] == [False, False]
        with pytest.raises(TimeoutError):
            next(results)

    def test_map_that_is_given_up_cancels_the_rest(self, create: Create, gate: Gate) -> None:
        executor = create(max_workers=1)
        results = executor.map(tasks.enter_if, [gate] * 6, [False, True, True, True, True, True])
        next(results)
        gate.wait_for(1)
        results.close()  # type: ignore[attr-defined]
        gate.open()
        executor.shutdown()
        assert len(gate.arrived()) == 1
        assert executor.stats().cancelled == 4

    @pytest.mark.parametrize("buffersize", [1, 2, 4, 8])
    def test_map_with_a_buffer_keeps_the_order(self, executor: Executor, buffersize: int) -> None:
        each = executor.map(pow, range(4), range(4), buffersize=buffersize)
        assert list(each) == list(map(pow, range(4), range(4)))

    @pytest.mark.parametrize("chunksize", [1, 3])
    def test_map_with_a_buffer_submits_no_more_than_that_ahead(self, create: Create, chunksize: int) -> None:
        asked = []

        def numbers() -> Iterator[int]:
            for number in itertools.count():
                asked.append(number)
                yield number

        with create() as executor:
            results = executor.map(abs, numbers(), chunksize=chunksize, buffersize=2)
            assert len(asked) == 2 * chunksize
            assert [next(results) for _ in range(chunksize)] == list(range(chunksize))
            assert len(asked) == 3 * chunksize
            list(itertools.islice(results, 10 * chunksize))
            assert len(asked) == 13 * chunksize

    def test_map_with_a_buffer_cancels_what_has_not_begun_when_it_is_left(
        self, create: Create, gate: Gate
    ) -> None:
        self.need(Capability.ISOLATED)
        executor = create(max_workers=1)
        results = executor.map(gate.enter, itertools.count(), timeout=0, buffersize=5)
        with pytest.raises(TimeoutError):
            next(results)
        gate.open()
        executor.shutdown()
        assert len(gate.arrived()) <= 1

    @pytest.mark.parametrize(("buffersize", "error"), [(0, ValueError), (-1, ValueError), ("2", TypeError)])
    def test_map_refuses_what_is_no_size_of_a_buffer(
        self, executor: Executor, buffersize: Any, error: type[Exception]
    ) -> None:
        with pytest.raises(error, match="buffersize must be"):
            executor.map(pow, [1], [1], buffersize=buffersize)

    @pytest.mark.parametrize("chunksize", [1, 3])
    def test_map_keeps_no_reference_to_what_it_yielded(self, executor: Executor, chunksize: int) -> None:
        references = []
        for result in executor.map(tasks.make_plain, range(6), chunksize=chunksize):
            references.append(weakref.ref(result))
            del result
            tasks.poll(lambda: references[-1]() is None, "the yielded result was freed")
        assert len(references) == 6

    # ------------------------------------------------------------ exceptions

    def test_an_exception_arrives_as_itself(self, executor: Executor) -> None:
        error = executor.submit(tasks.raise_, KeyError("a", 1)).exception(DEADLINE)
        assert type(error) is KeyError
        assert error.args == ("a", 1)

    def test_the_traceback_shows_the_line_in_the_worker(self, executor: Executor) -> None:
        error = executor.submit(tasks.fail_in_the_worker).exception(DEADLINE)
        assert error is not None
        text = "".join(traceback.format_exception(error))
        assert 'raise LookupError("from the worker")  # this very line' in text
        if self.promises(Capability.ISOLATED):
            assert isinstance(error.__cause__, RemoteTraceback)
            assert "this very line" in str(error.__cause__)

    def test_notes_and_attributes_of_an_exception_arrive(self, executor: Executor) -> None:
        original = ValueError("x")
        original.add_note("a note")
        original.code = 7  # type: ignore[attr-defined]
        error: Any = executor.submit(tasks.raise_, original).exception(DEADLINE)
        assert "a note" in error.__notes__
        assert error.code == 7

    @pytest.mark.parametrize("cls", [tasks.FalsyByBool, tasks.FalsyByLength])
    def test_a_falsy_exception_is_raised(self, executor: Executor, cls: type[Exception]) -> None:
        future = executor.submit(tasks.raise_new, cls)
        with pytest.raises(cls):
            future.result(DEADLINE)

    @pytest.mark.parametrize("cls", [SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_base_exceptions_are_the_tasks_answer(self, executor: Executor, cls: type[BaseException]) -> None:
        assert type(executor.submit(tasks.raise_new, cls).exception(DEADLINE)) is cls
        assert executor.submit(pow, 2, 3).result(DEADLINE) == 8

    def test_sys_exit_arrives_with_its_code(self, executor: Executor) -> None:
        error = executor.submit(tasks.exit_with, 3).exception(DEADLINE)
        assert isinstance(error, SystemExit)
        assert error.code == 3

    def test_stop_iteration_is_an_exception_like_others(self, executor: Executor) -> None:
        assert type(executor.submit(tasks.raise_new, StopIteration).exception(DEADLINE)) is StopIteration

    # ------------------------------------------------------------ futures

    def test_result_times_out_and_can_be_asked_again(self, create: Create, gate: Gate) -> None:
        future = create().submit(gate.enter, "late")
        with pytest.raises(TimeoutError):
            future.result(0.01)
        with pytest.raises(TimeoutError):
            future.exception(0)
        gate.open()
        assert future.result(DEADLINE) == "late"

    def test_wait_and_as_completed_work(self, create: Create, gate: Gate) -> None:
        executor = create()
        slow, fast = executor.submit(gate.enter, 1), executor.submit(pow, 2, 2)
        done, pending = concurrent.futures.wait(
            [slow, fast], DEADLINE, return_when=concurrent.futures.FIRST_COMPLETED
        )
        assert (done, pending) == ({fast}, {slow})
        completed = concurrent.futures.as_completed([slow, fast], DEADLINE)
        assert next(completed) is fast
        gate.open()
        assert next(completed) is slow

    def test_wait_returns_at_the_first_exception(self, create: Create, gate: Gate) -> None:
        executor = create()
        slow, wrong = executor.submit(gate.enter), executor.submit(tasks.raise_new, ValueError)
        done, _ = concurrent.futures.wait(
            [slow, wrong], DEADLINE, return_when=concurrent.futures.FIRST_EXCEPTION
        )
        assert done == {wrong}

    def test_a_queued_task_can_be_cancelled_a_running_one_not(self, create: Create, gate: Gate) -> None:
        executor = create(max_workers=1)
        running = executor.submit(gate.enter, 1)
        queued, last = executor.submit(gate.enter, 2), executor.submit(gate.enter, 3)
        gate.wait_for(1)
        assert not running.cancel()
        assert queued.cancel()
        gate.open()
        assert (running.result(DEADLINE), last.result(DEADLINE)) == (1, 3)
        with pytest.raises(concurrent.futures.CancelledError):
            queued.result(DEADLINE)
        assert len(gate.arrived()) == 2
        stats = executor.stats()
        assert (stats.succeeded, stats.cancelled, stats.queued) == (2, 1, 0)

    def test_wait_learns_of_a_cancelled_task(self, create: Create, gate: Gate) -> None:
        executor = create(max_workers=1)
        executor.submit(gate.enter)
        queued = executor.submit(pow, 1, 1)
        queued.cancel()
        gate.open()
        assert concurrent.futures.wait([queued], DEADLINE).done == {queued}

    # ------------------------------------------------------------ callbacks

    def test_a_callback_gets_the_finished_future(self, executor: Executor) -> None:
        seen: list[object] = []
        called = threading.Event()

        def callback(done: StandardFuture[Any]) -> None:
            seen.extend([done, done.result(0)])
            called.set()

        future = executor.submit(pow, 2, 5)
        future.add_done_callback(callback)
        assert called.wait(DEADLINE)
        assert seen == [future, 32]

    @pytest.mark.parametrize("cls", [ValueError, SystemExit, KeyboardInterrupt])
    def test_a_callback_that_raises_hurts_nobody(
        self, create: Create, gate: Gate, cls: type[BaseException]
    ) -> None:
        executor = create(max_workers=1)
        future = executor.submit(gate.enter, 1)
        future.add_done_callback(lambda done: tasks.raise_new(cls))
        gate.open()
        assert future.result(DEADLINE) == 1
        assert executor.submit(pow, 2, 2).result(DEADLINE) == 4

    def test_a_callback_may_submit(self, create: Create, gate: Gate) -> None:
        executor = create(max_workers=1)
        answers: list[int] = []
        finished = threading.Event()

        def again(done: StandardFuture[int]) -> None:
            answers.append(done.result(0))
            if len(answers) < 5:
                executor.submit(tasks.add, answers[-1], 1).add_done_callback(again)
            else:
                finished.set()

        future = executor.submit(gate.enter, 1)
        future.add_done_callback(again)
        gate.open()
        assert finished.wait(DEADLINE)
        assert answers == [1, 2, 3, 4, 5]

    @pytest.mark.parametrize("wait", [True, False])
    def test_a_callback_may_shut_down(self, create: Create, gate: Gate, wait: bool) -> None:
        executor = create()
        returned = threading.Event()

        def end(_: object) -> None:
            executor.shutdown(wait=wait)
            returned.set()

        future = executor.submit(gate.enter, 1)
        future.add_done_callback(end)
        others = [executor.submit(pow, 2, i) for i in range(4)]
        gate.open()
        assert returned.wait(DEADLINE)
        assert [other.result(DEADLINE) for other in others] == [1, 2, 4, 8]
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            executor.submit(pow, 2, 2)

    def test_two_callbacks_may_shut_down_at_once(self, create: Create, gate: Gate) -> None:
        executor = create()
        both = threading.Barrier(2)
        returned = threading.Semaphore(0)

        def end(_: object) -> None:
            both.wait(DEADLINE)
            executor.shutdown(wait=True)
            returned.release()

        futures = [executor.submit(gate.enter, i) for i in range(2)]
        for future in futures:
            future.add_done_callback(end)
        gate.open()
        assert returned.acquire(timeout=DEADLINE)
        assert returned.acquire(timeout=DEADLINE)

    # ------------------------------------------------------------ references

    @pytest.mark.parametrize(
        "call",
        [
            lambda item: (item.method,),
            lambda item: (item,),
            lambda item: (tasks.capture, item),
            lambda item: (divmod, item, 1),
        ],
        ids=["bound method", "callable", "argument", "argument of a failing task"],
    )
    def test_nothing_is_kept_of_a_finished_task(
        self, executor: Executor, call: Callable[[tasks.Plain], tuple[Any, ...]]
    ) -> None:
        item = tasks.Plain()
        freed = threading.Event()
        reference = weakref.ref(item, lambda _: freed.set())
        executor.submit(*call(item))  # The future is not kept either.
        del item
        assert freed.wait(DEADLINE), f"{reference()!r} is still alive"

    def test_nothing_is_kept_of_a_result(self, executor: Executor) -> None:
        future: Future[tasks.Plain] | None = executor.submit(tasks.make_plain, 0)
        assert future is not None
        reference = weakref.ref(future.result(DEADLINE))
        future = None
        tasks.poll(lambda: reference() is None, "the result was freed")

    def test_nothing_is_kept_of_an_exception(self, executor: Executor) -> None:
        future: Future[Any] | None = executor.submit(tasks.raise_new, tasks.FalsyByBool)
        assert future is not None
        error = future.exception(DEADLINE)
        assert error is not None
        reference = weakref.ref(error)
        future = error = None
        tasks.poll(lambda: reference() is None, "the exception was freed")
