from typing import Any

import numpy as np
import pytest

from fedexec._workload.data import DataSpec

CONFIG = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02, "server_round": 1}

torch: Any
training: Any


@pytest.fixture(autouse=True, scope="module")
def _import_torch():
    """Import torch only in the process that runs these tests, because that takes seconds."""
    global torch, training
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'fedexec[demo]'")
    from fedexec._workload import training


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_learns_the_digits():
    data = DataSpec()
    weights = training.initial_weights(0)
    loss, examples, metrics = training.test(weights, {}, data=data)
    assert examples == 360
    assert metrics["accuracy"] < 0.3
    weights, examples, _ = training.train(weights, CONFIG | {"epochs": 4}, data=data, client=0)
    assert examples == 1437
    better_loss, _, metrics = training.test(weights, {}, data=data)
    assert better_loss < loss
    assert metrics["accuracy"] > 0.9


def test_the_same_seed_trains_to_the_same_bits_whatever_torch_drew_before():
    data = DataSpec(clients=5, seed=3)
    results = []
    for _ in range(2):
        torch.rand(17)
        results.append(training.train(training.initial_weights(3), CONFIG, data=data, client=2)[0])
    for left, right in zip(*results, strict=True):
        np.testing.assert_array_equal(left, right)


def test_rounds_and_clients_shuffle_differently():
    seeds = {training._seed(0, client, server_round) for client in range(20) for server_round in range(20)}
    assert len(seeds) == 400


def test_making_initial_weights_leaves_torchs_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    training.initial_weights(5)
    assert torch.rand(1) == expected


def test_the_callers_arrays_are_not_written_to():
    weights = training.initial_weights(0)
    for array in weights:
        array.flags.writeable = False
    before = [array.copy() for array in weights]
    training.train(weights, CONFIG, data=DataSpec(clients=20), client=0)
    for left, right in zip(weights, before, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("spoil", [lambda w: w[:-1], lambda w: [*w[:-1], np.zeros(3, np.float32)]])
def test_weights_that_do_not_fit_are_an_error(spoil):
    with pytest.raises(RuntimeError):
        training.set_weights(training.Net(), spoil(training.initial_weights(0)))
