"""What clients return is checked: rubbish is a failure of its client, and what is odd is remarked."""

import functools
import io
import pickle

import numpy as np
import pytest
from flwr.common import ndarrays_to_parameters

import fedexec
from fedexec.flower.grpc import (
    ExecutorClient,
    RoundFailedError,
)
from flower import jobs
from flower.federations import federate, weights


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a layer less", "returned 1 arrays, but the model has 2"),
        ("another shape", "returned array 0 of shape (2, 3), but the model's is (3, 2)"),
        ("text", "returned array 1 of type <U1, but the model's is float32"),
        ("integers", "returned array 0 of type int32, but the model's is float32"),
        ("truth values", "returned array 0 of type bool, but the model's is float32"),
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

            client.fit = fit_then_pack  # type: ignore[method-assign]
            return client

    with fedexec.create_executor("inline") as executor:
        strategy, _ = federate(executor, clients=3, rounds=1, kinds={1: Archiving})
    assert strategy.rounds[1].failures == [{"client": 1, "reason": "returned array 0 as a NpzFile"}]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("far away", "returned array 0 with values up to 3.2e+37, far above 1e+06"),
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
    assert "Round 1: 1 of 3 clients gave a result, but 2 are needed. returned array 1" in str(caught.value)
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
        ({"metrics": {"accuracy": "high"}}, "returned the metric 'accuracy' as a str, which is not a number"),
        (
            {"metrics": {"accuracy": b"high"}},
            "returned the metric 'accuracy' as a bytes, which is not a number",
        ),
        ({"metrics": {"accuracy": float("nan")}}, "returned the metric 'accuracy' as nan"),
        ({"metrics": {"accuracy": 0.5, "more": float("inf")}}, "returned the metric 'more' as inf"),
        ({"metrics": {}}, "returned no metric 'accuracy', although most other clients did"),
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
    assert failure["reason"] == "returned the metric 'accuracy' as a str, which is not a number"


def test_a_metric_that_cannot_be_aggregated_is_a_failure_of_its_client():
    def metric(parameters, config, *, client):
        moved, examples, _ = jobs.fit(parameters, config, client=client)
        return moved, examples, {"loss": "low" if client == 0 else 1.0}

    def mean(pairs):
        return {"loss": sum(metrics["loss"] for _, metrics in pairs) / len(pairs)}

    with fedexec.create_executor("inline") as executor:
        strategy, _ = federate(executor, clients=3, rounds=1, fit=metric, fit_metrics_aggregation_fn=mean)
    (failure,) = strategy.rounds[1].failures
    assert failure == {"client": 0, "reason": "returned the metric 'loss' as a str, which is not a number"}
