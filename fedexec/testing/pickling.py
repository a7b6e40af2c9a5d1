"""Conformance tests of pickling: what can be sent between processes, and what cannot."""

import functools
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest

from fedexec.errors import UnpickleError, WorkerDiedError
from fedexec.executor import Executor
from fedexec.interface import Capability
from fedexec.testing import bad_tasks, tasks
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE

__all__ = ["PicklingConformance"]


class PicklingConformance(Suite):
    """An error in pickling fails one task; the executor goes on."""

    @pytest.fixture(autouse=True)
    def _goes_on(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """Check after each test that the shared executor still works."""
        yield
        if "executor" in request.fixturenames and request.function.__name__ in vars(PicklingConformance):
            assert self._shared is not None
            assert list(self._shared.map(pow, [2] * 4, range(4))) == [1, 2, 4, 8]

    # ------------------------------------------------------------ what can be sent

    def test_lambdas_and_closures_can_be_tasks(self, executor: Executor) -> None:
        offset = 7
        assert executor.submit(lambda x: x + offset, 1).result(DEADLINE) == 8

    def test_lambdas_and_closures_can_be_arguments_and_results(self, executor: Executor) -> None:
        offset = 7
        twice: Any = lambda fn: lambda x: fn(fn(x))  # noqa: E731
        result = executor.submit(twice, lambda x: x + offset).result(DEADLINE)
        assert result(1) == 15

    def test_functions_of_a_namespace_without_a_name_can_be_tasks(self, executor: Executor) -> None:
        namespace: dict[str, Any] = {}
        exec("def double(x):\n    return 2 * x", namespace)
        assert executor.submit(namespace["double"], 4).result(DEADLINE) == 8

    def test_local_classes_come_back(self, executor: Executor) -> None:
        class Local:
            value = 3

        assert executor.submit(lambda: Local()).result(DEADLINE).value == 3

    def test_a_local_exception_class_is_caught_by_class(self, executor: Executor) -> None:
        class LocalError(Exception):
            pass

        def fail() -> None:
            raise LocalError("mine")

        with pytest.raises(LocalError, match="mine"):
            executor.submit(fail).result(DEADLINE)

    def test_partials_and_bound_methods_can_be_tasks(self, executor: Executor) -> None:
        assert executor.submit(functools.partial(tasks.add, 1), y=2).result(DEADLINE) == 3
        assert executor.submit("abc".upper).result(DEADLINE) == "ABC"

    def test_a_task_works_on_a_copy(self, executor: Executor) -> None:
        self.need(Capability.ISOLATED)
        data = [1]
        executor.submit(data.append, 2).result(DEADLINE)
        assert data == [1]

    # ------------------------------------------------------------ what cannot

    @pytest.mark.parametrize(
        ("args", "kwargs", "named"),
        [
            ((1, threading.Lock()), {}, "argument 1 (lock)"),
            ((1,), {"where": threading.Lock()}, "argument 'where' (lock)"),
        ],
        ids=["positional", "keyword"],
    )
    def test_an_argument_that_does_not_pickle_is_named(
        self, executor: Executor, args: tuple[Any, ...], kwargs: dict[str, Any], named: str
    ) -> None:
        self.need(Capability.ISOLATED)
        future = executor.submit(tasks.capture, *args, **kwargs)  # no error here
        error = future.exception(DEADLINE)
        assert type(error) is TypeError
        assert named in "".join(error.__notes__)
        assert "capture" in "".join(error.__notes__)

    def test_a_function_that_does_not_pickle_is_named(self, executor: Executor) -> None:
        self.need(Capability.ISOLATED)
        lock = threading.Lock()
        error = executor.submit(lambda: lock).exception(DEADLINE)
        assert type(error) is TypeError
        assert "the function itself" in "".join(error.__notes__)

    def test_a_result_that_does_not_pickle_is_an_error(self, executor: Executor) -> None:
        self.need(Capability.ISOLATED)
        error = executor.submit(tasks.make, threading.Lock).exception(DEADLINE)
        assert type(error) is TypeError
        assert "while pickling the result" in "".join(error.__notes__)

    def test_an_exception_that_does_not_pickle_is_told_in_the_traceback(self, executor: Executor) -> None:
        self.need(Capability.ISOLATED)
        error = executor.submit(tasks.raise_new, tasks.HoldsLock).exception(DEADLINE)
        assert type(error) is TypeError
        assert "HoldsLock: holds a lock" in str(error.__cause__)

    def test_exceptions_arrive_whatever_arguments_their_classes_take(self, executor: Executor) -> None:
        """Python rebuilds an exception from ``args``, which often differ from the original arguments."""

        def fail(kind: type[BaseException], *args: Any, **kwargs: Any) -> None:
            raise kind(*args, **kwargs)

        error = executor.submit(fail, tasks.NeedsTwoArguments, 4, "here").exception(DEADLINE)
        assert type(error) is tasks.NeedsTwoArguments
        assert str(error) == "4 at here"
        error = executor.submit(fail, tasks.OddError, "no.txt", extra=[7]).exception(DEADLINE)
        assert type(error) is tasks.OddError
        assert (error.errno, error.filename, error.extra) == (2, "no.txt", [7])
        two = tasks.OfTwoKinds(2, "z")
        group = [tasks.NeedsTwoArguments(1, "x"), tasks.OddError("y", extra=None), KeyError(3), two]
        error = executor.submit(fail, ExceptionGroup, "many", group).exception(DEADLINE)
        assert isinstance(error, ExceptionGroup)
        assert [type(each) for each in error.exceptions] == [type(each) for each in group]
        error = executor.submit(fail, UnicodeDecodeError, "utf8", b"x", 0, 1, "why").exception(DEADLINE)
        assert isinstance(error, UnicodeDecodeError)
        assert (error.object, error.reason) == (b"x", "why")

    def test_an_exception_that_does_not_unpickle_is_told(self, executor: Executor) -> None:
        self.need(Capability.ISOLATED)

        def fail() -> None:
            raise tasks.RefusesToUnpickle(4, "here")

        error = executor.submit(fail).exception(DEADLINE)
        assert isinstance(error, UnpickleError)
        assert isinstance(error, BrokenProcessPool)
        assert error.what == "exception"
        assert isinstance(error.__cause__, TypeError)
        assert "RefusesToUnpickle: 4 at here" in "".join(error.__notes__)

    # The following names, and the expected types, are those of CPython's test_deadlock.py.

    @pytest.mark.parametrize(
        ("cls", "expected"),
        [(tasks.ErrorAtPickle, pickle.PicklingError), (tasks.ExitAtPickle, SystemExit)],
    )
    def test_trouble_while_a_task_is_pickled(
        self, executor: Executor, cls: Callable[[], Any], expected: type[BaseException]
    ) -> None:
        self.need(Capability.ISOLATED)
        error = executor.submit(id, cls()).exception(DEADLINE)
        assert type(error) is expected
        assert "argument 0" in "".join(error.__notes__)

    @pytest.mark.parametrize(
        ("cls", "cause"),
        [(tasks.ErrorAtUnpickle, pickle.UnpicklingError), (tasks.ExitAtUnpickle, SystemExit)],
    )
    def test_trouble_while_a_task_is_unpickled(
        self, executor: Executor, cls: Callable[[], Any], cause: type[BaseException]
    ) -> None:
        self.need(Capability.ISOLATED)
        error = executor.submit(id, cls()).exception(DEADLINE)
        assert isinstance(error, UnpickleError)
        assert isinstance(error, BrokenProcessPool)
        assert (error.what, error.task) == ("task", "id")
        assert type(error.__cause__) is cause

    def test_a_crash_while_a_task_is_unpickled(self, executor: Executor) -> None:
        self.need(Capability.SURVIVES_DEATH)
        error = executor.submit(id, tasks.CrashAtUnpickle()).exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)
        assert isinstance(error, BrokenProcessPool)

    @pytest.mark.parametrize(
        ("cls", "expected"),
        [(tasks.ErrorAtPickle, pickle.PicklingError), (tasks.ExitAtPickle, SystemExit)],
    )
    def test_trouble_while_a_result_is_pickled(
        self, executor: Executor, cls: Callable[[], Any], expected: type[BaseException]
    ) -> None:
        self.need(Capability.ISOLATED)
        assert type(executor.submit(tasks.make, cls).exception(DEADLINE)) is expected

    def test_a_crash_while_a_result_is_pickled(self, executor: Executor) -> None:
        self.need(Capability.SURVIVES_DEATH)
        error = executor.submit(tasks.make, tasks.CrashAtPickle).exception(DEADLINE)
        assert isinstance(error, WorkerDiedError)

    @pytest.mark.parametrize(
        ("cls", "cause"),
        [(tasks.ErrorAtUnpickle, pickle.UnpicklingError), (tasks.ExitAtUnpickle, SystemExit)],
    )
    def test_trouble_while_a_result_is_unpickled(
        self, executor: Executor, cls: Callable[[], Any], cause: type[BaseException]
    ) -> None:
        self.need(Capability.ISOLATED)
        error = executor.submit(tasks.make, cls).exception(DEADLINE)
        assert isinstance(error, UnpickleError)
        assert isinstance(error, BrokenProcessPool)
        assert error.what == "result"
        assert type(error.__cause__) is cause

    def test_a_crash_under_much_data_does_not_hang(self, executor: Executor) -> None:
        self.need(Capability.SURVIVES_DEATH)
        data = b"x" * 2**20  # more than a pipe holds
        futures = [executor.submit(bad_tasks.kill_self_with, data) for _ in range(4)]
        assert all(isinstance(future.exception(DEADLINE), WorkerDiedError) for future in futures)

    def test_a_crash_after_shutdown_does_not_hang(self, create: Create) -> None:
        self.need(Capability.SURVIVES_DEATH)
        executor = create()
        future = executor.submit(bad_tasks.kill_self)
        executor.shutdown(wait=True)
        assert isinstance(future.exception(0), WorkerDiedError)

    def test_an_error_in_pickle_after_shutdown_does_not_hang(self, create: Create) -> None:
        self.need(Capability.ISOLATED)
        executor = create()
        future = executor.submit(id, tasks.ErrorAtPickle())
        executor.shutdown(wait=False)
        assert type(future.exception(DEADLINE)) is pickle.PicklingError
        executor.shutdown(wait=True)

    def test_one_bad_task_in_a_map_spoils_no_other(self, executor: Executor) -> None:
        self.need(Capability.ISOLATED)
        bad = [tasks.ErrorAtPickle(), tasks.ExitAtPickle(), tasks.ErrorAtUnpickle(), tasks.ExitAtUnpickle()]
        futures = [
            executor.submit(tasks.capture, value) for value in (1, bad[0], 2, bad[1], 3, bad[2], bad[3], 4)
        ]
        good = [future.result(DEADLINE)[0][0] for future in futures if future.exception(DEADLINE) is None]
        assert good == [1, 2, 3, 4]
