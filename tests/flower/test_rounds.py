"""Real Flower, real gRPC, real workers: what a round does when clients work, and when they do not."""

import ast
import functools
import gc
import io
import pickle
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from flwr.common import Code, FitIns, ndarrays_to_parameters, parameters_to_ndarrays

import fedexec
from fedexec.flower.grpc import (
    AddressError,
    ClientHost,
    ExecutorClient,
    FedAvgMp,
    RecordingExecutor,
    RoundFailedError,
    ServerUnreachableError,
    executor_evaluate_fn,
    serve,
)
from fedexec.flower.grpc.address import free_address
from fedexec.testing.tasks import DEADLINE, poll
from flower import jobs

BACKENDS = ["inline", "process", "pool", "loky"]


def federate(
    executor,
    *,
    clients,
    rounds=2,
    fit=jobs.fit,
    client_evaluate=jobs.evaluate,
    server_evaluate=jobs.evaluate,
    kinds=None,
    **strategy_options,
):
    """Run a whole federation in this process; return its strategy and what its tasks cost."""
    tasks = RecordingExecutor(executor)
    address = free_address()
    host = ClientHost(
        [
            (kinds or {}).get(index, ExecutorClient)(
                tasks,
                fit=functools.partial(fit, client=index),
                evaluate=functools.partial(client_evaluate, client=index),
                index=index,
            )
            for index in range(clients)
        ],
        server_address=address,
    )
    options = {"fit_clients": clients, "available_clients": clients} | strategy_options
    options.setdefault(
        "initial_parameters", ndarrays_to_parameters([np.zeros((3, 2), np.float32), np.ones(4, np.float32)])
    )
    strategy = FedAvgMp(evaluate_fn=executor_evaluate_fn(tasks, server_evaluate), **options)
    try:
        serve(strategy, address=address, num_rounds=rounds, max_clients=clients, on_ready=host.start)
    finally:
        host.join()
    return strategy, tasks


def weights(strategy):
    return parameters_to_ndarrays(strategy.parameters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_fit_and_evaluate_goes_through_the_executor(backend):
    with fedexec.create_executor(backend, max_workers=2) as executor:
        strategy, tasks = federate(executor, clients=4, evaluate_clients=2)
    kinds = [record.kind for record in tasks.records]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"fit": 8, "evaluate": 4, "server evaluate": 3}
    assert executor.stats().succeeded == 15
    assert [round_.server_round for round_ in strategy.rounds] == [0, 1, 2]
    assert strategy.rounds[2].clients == [0, 1, 2, 3]
    assert strategy.rounds[2].client_metrics == {"accuracy": 0.5}
    assert not any(round_.failures for round_ in strategy.rounds)


def test_backends_agree_to_the_bit_when_some_clients_are_sampled():
    results = []
    for backend in BACKENDS:
        with fedexec.create_executor(backend, max_workers=3) as executor:
            strategy, _ = federate(executor, clients=7, rounds=3, fit_clients=3, seed=5)
        assert [round_.failures for round_ in strategy.rounds] == [[]] * 4, backend
        results.append((weights(strategy), [round_.clients for round_ in strategy.rounds]))
    reference, sampled = results[0]
    assert len({tuple(clients) for clients in sampled}) > 2, "the sample should differ from round to round"
    for other, other_sampled in results[1:]:
        assert other_sampled == sampled
        for left, right in zip(reference, other, strict=True):
            np.testing.assert_array_equal(left, right)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="a newer Python collects nothing while it parses")
def test_clients_that_read_weights_at_once_do_not_disturb_each_other():
    ins = FitIns(ndarrays_to_parameters([np.zeros((3, 2), np.float32)]), {"server_round": 1})

    def train(client):
        answers.append(client.fit(ins))

    def train_until_disturbed():  # while another thread collects, this one does not
        end = time.monotonic() + DEADLINE
        while not others and time.monotonic() < end:
            train(clients[0])

    def collecting(phase, info):  # in the middle of an array's header, another client gets its turn
        in_parser = sys._getframe(1).f_code is ast.parse.__code__
        if in_parser and threading.current_thread() is first and len(others) < 20:
            others.append(threading.Thread(target=train, args=(clients[1],)))
            others[-1].start()
            others[-1].join(0.02)

    answers, others = [], []
    with fedexec.create_executor("inline") as executor:
        clients = [
            ExecutorClient(executor, fit=functools.partial(jobs.fit, client=index)).to_client()
            for index in range(2)
        ]
        first = threading.Thread(target=train_until_disturbed)
        before = gc.get_threshold()
        gc.callbacks.append(collecting)
        gc.set_threshold(1)
        try:
            first.start()
            first.join()
        finally:
            gc.set_threshold(*before)
            gc.callbacks.remove(collecting)
        for other in others:
            other.join()
    assert others
    assert {(answer.status.code, answer.status.message) for answer in answers} == {(Code.OK, "Success")}


def test_another_seed_samples_other_clients():
    sampled = []
    for seed in (0, 1):
        with fedexec.create_executor("inline") as executor:
            strategy, _ = federate(executor, clients=6, rounds=3, fit_clients=2, seed=seed)
        sampled.append([round_.clients for round_ in strategy.rounds])
    assert sampled[0] != sampled[1]


@pytest.mark.parametrize("backend", ["process", "pool", "loky"])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "ValueError: no data today"),
        ("exit", "exited with code 3"),
        ("kill", "SIGKILL"),
        ("hang", "was ended after 1 s"),
        ("rubbish", "fit must return what NumPyClient.fit does; got 'nonsense'"),
        ("array metric", "metric 'loss' is a float32, no scalar"),
        ("nan", "returned array 1 with values that are not finite"),
    ],
)
def test_a_client_that_fails_is_one_failure_and_lives_on(backend, how, reason):
    fit = functools.partial(jobs.faulty_fit, culprits=(1,), how=how)
    with fedexec.create_executor(backend, max_workers=2, timeout=1 if how == "hang" else None) as executor:
        strategy, _ = federate(executor, clients=3, fit=fit)
    assert [failure["client"] for failure in strategy.rounds[1].failures] == [1]
    assert reason in strategy.rounds[1].failures[0]["reason"].replace("\n", " ")
    assert strategy.rounds[2].failures == []
    assert strategy.rounds[2].clients == [0, 1, 2]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a layer less", "returned 1 arrays, the model has 2"),
        ("another shape", "returned array 0 of shape (2, 3), the model's is (3, 2)"),
        ("text", "returned array 1 of type <U1, the model's is float32"),
        ("integers", "returned array 0 of type int32, the model's is float32"),
        ("truth values", "returned array 0 of type bool, the model's is float32"),
        ("more digits", "returned array 1 of type float64, whose values the model's float32 cannot hold"),
        ("no samples", "says that it trained on 0 samples"),
    ],
)
@pytest.mark.parametrize("culprit", [0, 1])
def test_rubbish_is_a_failure_and_the_others_are_averaged_as_if_it_had_not_come(how, reason, culprit):
    averages = []
    for fault in (how, "raise"):
        fit = functools.partial(jobs.faulty_fit, culprits=(culprit,), how=fault)
        with fedexec.create_executor("inline", max_workers=2) as executor:
            strategy, _ = federate(executor, clients=3, rounds=1, fit=fit)
        averages.append(weights(strategy))
        assert [failure["client"] for failure in strategy.rounds[1].failures] == [culprit]
        if fault == how:
            assert strategy.rounds[1].failures[0]["reason"] == reason
    for left, right in zip(*averages, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("culprit", [0, 1])
def test_values_of_another_type_that_the_models_can_hold_are_averaged_in_the_models(culprit):
    averages = []
    for how in ("other types", "none"):
        fit = functools.partial(jobs.faulty_fit, culprits=(culprit,), how=how)
        with fedexec.create_executor("inline", max_workers=2) as executor:
            strategy, _ = federate(executor, clients=3, rounds=2, fit=fit)
        assert [round_.failures for round_ in strategy.rounds] == [[], [], []]
        averages.append(weights(strategy))
    for left, right in zip(*averages, strict=True):
        assert left.dtype == right.dtype == np.float32
        np.testing.assert_array_equal(left, right)


def test_a_models_counters_are_averaged_and_stay_integers():
    with fedexec.create_executor("inline") as executor:
        model = ndarrays_to_parameters([np.zeros(2, np.float32), np.array([5])])
        strategy, _ = federate(executor, clients=3, fit=jobs.count_up, initial_parameters=model)
    assert [round_.failures for round_ in strategy.rounds] == [[], [], []]
    np.testing.assert_array_equal(weights(strategy)[1], np.array([5 + 2 + 2]))
    assert [array.dtype for array in weights(strategy)] == [np.float32, np.int64]


def test_an_archive_instead_of_an_array_is_a_failure():
    class Archiving(ExecutorClient):
        def to_client(self):
            client = super().to_client()
            fit = client.fit

            def fit_then_pack(ins):
                res = fit(ins)
                file = io.BytesIO()
                np.savez(file, np.zeros((3, 2), np.float32))
                res.parameters.tensors[0] = file.getvalue()
                return res

            client.fit = fit_then_pack
            return client

    with fedexec.create_executor("inline") as executor:
        strategy, _ = federate(executor, clients=3, rounds=1, kinds={1: Archiving})
    assert strategy.rounds[1].failures == [{"client": 1, "reason": "returned array 0 as a NpzFile"}]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("far away", "returned array 0 with values up to 3.2e+37, where 1e+06 is far"),
        ("all the samples", f"says that it trained on {2**62} samples"),
    ],
)
def test_what_is_absurd_counts_and_is_remarked(how, reason, caplog):
    fit = functools.partial(jobs.faulty_fit, culprits=(1,), how=how)
    with fedexec.create_executor("inline") as executor:
        strategy, _ = federate(executor, clients=3, rounds=1, fit=fit)
    assert strategy.rounds[1].failures == []
    assert strategy.rounds[1].remarks == [{"client": 1, "reason": reason}]
    assert f"client 1: {reason}; it counts all the same" in caplog.text


def test_what_makes_the_average_overflow_is_left_out_after_all():
    averages = []
    for how in ("far away", "raise"):
        fit = functools.partial(jobs.faulty_fit, culprits=(1,), how=how)
        with fedexec.create_executor("inline") as executor, np.errstate(over="ignore"):
            strategy, _ = federate(executor, clients=3, rounds=1, fit=fit, inplace=False)
        averages.append(weights(strategy))
        assert strategy.rounds[1].remarks == []
        (failure,) = strategy.rounds[1].failures
        assert failure["client"] == 1
    for left, right in zip(*averages, strict=True):
        np.testing.assert_array_equal(left, right)


def test_too_few_results_end_the_run_with_the_reason():
    fit = functools.partial(jobs.faulty_fit, culprits=(1, 2), how="nan")
    with fedexec.create_executor("inline") as executor, pytest.raises(RoundFailedError) as caught:
        federate(executor, clients=3, fit=fit, min_results=2)
    assert "Round 1: 1 of 3 clients gave a result, 2 are needed. returned array 1" in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args


def test_an_evaluation_without_a_loss_is_a_failure():
    with fedexec.create_executor("inline") as executor:
        strategy, _ = federate(
            executor, clients=3, rounds=1, evaluate_clients=3, client_evaluate=jobs.lost_loss
        )
    assert strategy.rounds[1].failures == [{"client": 1, "reason": "returned a loss of nan"}]
    assert strategy.rounds[1].client_loss == 1.0


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"metrics": {"accuracy": "high"}}, "returned the metric 'accuracy' as a str, which is no number"),
        ({"metrics": {"accuracy": b"high"}}, "returned the metric 'accuracy' as a bytes, which is no number"),
        ({"metrics": {"accuracy": float("nan")}}, "returned the metric 'accuracy' as nan"),
        ({"metrics": {"accuracy": 0.5, "more": float("inf")}}, "returned the metric 'more' as inf"),
        ({"metrics": {}}, "returned no metric 'accuracy', which most others did"),
        ({"metrics": {"accuracy": 1e308}}, "returned 'accuracy' as 1e+308, which cannot be averaged"),
        ({"loss": 1e308}, "returned a loss of inf"),
        ({"samples": -1}, "says that it evaluated on -1 samples"),
    ],
)
def test_rubbish_in_an_evaluation_is_that_clients_failure(given, reason, culprit):
    evaluate = functools.partial(jobs.odd_evaluate, given=given, culprits=(culprit,))
    with fedexec.create_executor("inline") as executor:
        strategy, _ = federate(executor, clients=3, rounds=1, evaluate_clients=3, client_evaluate=evaluate)
    assert strategy.rounds[1].failures == [{"client": culprit, "reason": reason}]
    assert strategy.rounds[1].client_metrics == {"accuracy": 0.5}
    assert strategy.rounds[1].client_loss == strategy.rounds[1].loss


@pytest.mark.parametrize("given", [{"accuracy": 0.5, "a": 1, "b": "x"}, {"b": 2, "accuracy": 0.5}])
def test_metrics_that_few_give_fail_nobody(given):
    evaluate = functools.partial(jobs.odd_evaluate, given={"metrics": given})
    with fedexec.create_executor("inline") as executor:
        strategy, _ = federate(executor, clients=3, rounds=1, evaluate_clients=3, client_evaluate=evaluate)
    assert strategy.rounds[1].failures == []
    assert strategy.rounds[1].client_metrics == {"accuracy": 0.5}


def test_of_two_that_differ_the_servers_own_metrics_tell_who_is_wrong():
    evaluate = functools.partial(jobs.odd_evaluate, given={"metrics": {"accuracy": "high"}})
    with fedexec.create_executor("inline") as executor:
        strategy, _ = federate(executor, clients=1, rounds=1, evaluate_clients=1, client_evaluate=evaluate)
    (failure,) = strategy.rounds[1].failures
    assert failure["reason"] == "returned the metric 'accuracy' as a str, which is no number"


def test_a_metric_that_cannot_be_aggregated_is_a_failure_of_its_client():
    def metric(parameters, config, *, client):
        moved, examples, _ = jobs.fit(parameters, config, client=client)
        return moved, examples, {"loss": "low" if client == 0 else 1.0}

    def mean(pairs):
        return {"loss": sum(metrics["loss"] for _, metrics in pairs) / len(pairs)}

    with fedexec.create_executor("inline") as executor:
        strategy, _ = federate(executor, clients=3, rounds=1, fit=metric, fit_metrics_aggregation_fn=mean)
    (failure,) = strategy.rounds[1].failures
    assert failure == {"client": 0, "reason": "returned the metric 'loss' as a str, which is no number"}


@pytest.mark.parametrize(("times", "tried", "lost"), [(1, 4, 0), (2, 4, 1)])
def test_a_server_evaluation_that_dies_is_tried_again_then_reported(tmp_path, times, tried, lost):
    evaluate = functools.partial(jobs.evaluate_or_die, directory=tmp_path, times=times)
    with fedexec.create_executor("process", max_workers=1) as executor:
        strategy, tasks = federate(executor, clients=2, rounds=2, server_evaluate=evaluate)
    assert sum(record.kind == "server evaluate" for record in tasks.records) == tried
    assert [round_.loss is None for round_ in strategy.rounds] == [bool(lost), False, False]
    reasons = [failure["reason"] for failure in strategy.rounds[0].failures]
    assert len(reasons) == lost
    assert all("server evaluation" in reason and "SIGKILL" in reason for reason in reasons)


def test_the_log_names_the_clients_that_a_round_waits_for(tmp_path, caplog):
    file = tmp_path / "go"
    fit = functools.partial(jobs.wait_for, file=file)

    def release():
        poll(lambda: "awaited are the clients [1]" in caplog.text, "the stall was logged")
        file.touch()

    watcher = threading.Thread(target=release)
    watcher.start()
    with fedexec.create_executor("inline", max_workers=2) as executor:
        strategy, _ = federate(executor, clients=2, rounds=1, fit=fit, stall_seconds=0.2)
    watcher.join()
    assert strategy.rounds[1].failures == []


def test_a_round_without_any_result_ends_the_run_with_the_reason():
    fit = functools.partial(jobs.faulty_fit, culprits=(0, 1), how="exit")
    with fedexec.create_executor("process") as executor, pytest.raises(RoundFailedError) as caught:
        federate(executor, clients=2, fit=fit)
    assert caught.value.server_round == 1
    assert "exited with code 3" in str(caught.value)


def test_workers_do_not_know_flower():
    flower_seen = []

    class Watching(FedAvgMp):
        def aggregate_fit(self, server_round, results, failures):
            flower_seen.extend(res.metrics["knows_flower"] for _, res in results)
            return super().aggregate_fit(server_round, results, failures)

    for backend in ("process", "pool", "loky"):
        with fedexec.create_executor(backend) as executor:
            tasks = RecordingExecutor(executor)
            address = free_address()
            host = ClientHost(
                [ExecutorClient(tasks, fit=functools.partial(jobs.fit, client=0), index=0)],
                server_address=address,
            )
            strategy = Watching(
                fit_clients=1,
                available_clients=1,
                initial_parameters=ndarrays_to_parameters([np.zeros(2, np.float32)]),
            )
            serve(strategy, address=address, num_rounds=1, max_clients=1, on_ready=host.start)
            host.join()
            assert strategy.rounds[0].loss is None, "there is no server-side evaluation here"
    assert flower_seen == [0, 0, 0]


def test_the_host_does_not_import_torch():
    code = (
        "import fedexec._cli.federation, sys\n"
        "assert 'flwr' in sys.modules\n"
        "assert 'torch' not in sys.modules, 'the host imported torch'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_address_in_use_is_an_error_that_names_it():
    strategy = FedAvgMp(fit_clients=1, available_clients=1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(AddressError, match=f"{address}.*in use"):
            serve(strategy, address=address, num_rounds=1, max_clients=1)


def test_a_server_that_does_not_answer_is_an_error_that_names_it():
    address = free_address()
    host = ClientHost([], server_address=address, connect_timeout=0.2)
    with pytest.raises(ServerUnreachableError, match=address):
        host.start()


def test_signal_handlers_are_the_callers_again_after_serving():
    import signal

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with fedexec.create_executor("inline") as executor:
        federate(executor, clients=1, rounds=1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_fifty_clients_share_one_executor_and_one_process():
    with fedexec.create_executor("inline", max_workers=2) as executor:
        strategy, tasks = federate(executor, clients=50, rounds=1)
    assert strategy.rounds[1].clients == list(range(50))
    assert sum(record.kind == "fit" for record in tasks.records) == 50
