"""Real Flower, real gRPC, real workers: what a round does when clients work, and when they do not."""

import ast
import functools
import gc
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
from flwr.common import Code, FitIns, FitRes, ndarrays_to_parameters

import fedexec
from fedexec.flower.grpc import (
    AddressError,
    ClientHost,
    ExecutorClient,
    FedAvgMp,
    RoundFailedError,
    ServerUnreachableError,
    serve,
)
from fedexec.flower.grpc.address import free_address
from fedexec.testing.tasks import DEADLINE, poll
from flower import jobs
from flower.federations import federate, weights

BACKENDS = ["inline", "process", "pool", "loky"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_fit_and_evaluate_goes_through_the_executor(backend):
    with fedexec.create_executor(backend, max_workers=2) as executor:
        strategy, recorder = federate(executor, clients=4, evaluate_clients=2)
    kinds = [record.kind for record in recorder.tasks]
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

    answers: list[FitRes] = []
    others: list[threading.Thread] = []
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


@pytest.mark.thorough_but("process")
@pytest.mark.parametrize("backend", ["process", "pool", "loky"])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("raise", "ValueError: no data today"),
        ("exit", "exited with code 3"),
        ("kill", "SIGKILL"),
        ("hang", "was ended after 1 s"),
        ("rubbish", "fit must return what NumPyClient.fit does; got 'nonsense'"),
        ("array metric", "metric 'loss' is a float32, not a scalar"),
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


@pytest.mark.parametrize(("times", "tried", "lost"), [(1, 4, 0), (2, 4, 1)])
def test_a_server_evaluation_that_dies_is_tried_again_then_reported(tmp_path, times, tried, lost):
    evaluate = functools.partial(jobs.evaluate_or_die, directory=tmp_path, times=times)
    with fedexec.create_executor("process", max_workers=1) as executor:
        strategy, recorder = federate(executor, clients=2, rounds=2, server_evaluate=evaluate)
    assert sum(record.kind == "server evaluate" for record in recorder.tasks) == tried
    assert [round_.loss is None for round_ in strategy.rounds] == [bool(lost), False, False]
    reasons = [failure["reason"] for failure in strategy.rounds[0].failures]
    assert len(reasons) == lost
    assert all("server evaluation" in reason and "SIGKILL" in reason for reason in reasons)


def test_the_log_names_the_clients_that_a_round_waits_for(tmp_path, caplog):
    file = tmp_path / "go"
    fit = functools.partial(jobs.wait_for, file=file)

    def release():
        poll(lambda: "waiting for clients [1]" in caplog.text, "the stall was logged")
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
    flower_seen: list[Any] = []

    class Watching(FedAvgMp):
        def aggregate_fit(self, server_round, results, failures):
            flower_seen.extend(res.metrics["knows_flower"] for _, res in results)
            return super().aggregate_fit(server_round, results, failures)

    for backend in ("process", "pool", "loky"):
        with fedexec.create_executor(backend) as executor:
            address = free_address()
            host = ClientHost(
                [ExecutorClient(executor, fit=functools.partial(jobs.fit, client=0), index=0)],
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
        strategy, recorder = federate(executor, clients=50, rounds=1)
    assert strategy.rounds[1].clients == list(range(50))
    assert sum(record.kind == "fit" for record in recorder.tasks) == 50
