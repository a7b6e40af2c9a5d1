"""The one recorder of tasks: what it notes of a future, whoever made it."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")

from fedexec.flower import RunRecorder, TaskRecord, TaskRecorder
from fedexec.flower.grpc import ExecutorClient, executor_evaluate_fn
from fedexec.interface import Usage

COST: dict[str, Any] = {
    "usage": Usage(worker_pid=1, wall_seconds=2.0, cpu_seconds=1.0),
    "started": 10.0,
    "ended": 12.0,
}


def settled(*, result: Any = None, error: Exception | None = None, **cost: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result) if error is None else future.set_exception(error)
    for name, value in cost.items():
        setattr(future, name, value)
    return future


def test_a_result_is_returned_and_its_cost_noted():
    recorder = TaskRecorder()
    future = settled(result=5, **COST)
    assert recorder.result_of(future, kind="fit", client=3, server_round=1) == 5
    assert recorder.tasks == [TaskRecord("fit", 3, 1, None, **COST)]


def test_an_exception_is_raised_and_noted_in_one_line():
    recorder = TaskRecorder()
    with pytest.raises(ValueError, match="no data"):
        recorder.result_of(settled(error=ValueError("no data"), **COST), kind="prepare")
    assert recorder.tasks == [TaskRecord("prepare", None, None, "ValueError: no data", **COST)]


def test_an_executor_of_another_library_tells_no_cost():
    recorder = TaskRecorder()
    with ThreadPoolExecutor(1) as executor:
        assert recorder.result_of(executor.submit(int, "7"), kind="fit") == 7
    assert recorder.tasks == [TaskRecord("fit", None, None, None)]


@pytest.mark.parametrize("recorder", [TaskRecorder(), RunRecorder()])
def test_clients_and_the_server_share_a_recorder(recorder):
    def evaluate(parameters, config):
        return 0.5, 1, {}

    with ThreadPoolExecutor(1) as executor:
        client = ExecutorClient(executor, fit=lambda *_: ([], 1, {}), index=4, recorder=recorder)
        client.fit([], {"server_round": 2})
        executor_evaluate_fn(executor, evaluate, recorder=recorder)(2, [], {})
    assert recorder.tasks == [TaskRecord("fit", 4, 2, None), TaskRecord("server evaluate", None, 2, None)]
