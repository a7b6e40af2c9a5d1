"""Nothing assumes torch: apps of numpy and of scikit-learn learn, and repeat to the bit."""

import numpy as np
import pytest

import fedexec
from fedexec.flower import simulate
from fedexec.flower.simulation.simulate import app_executor
from fedexec.settings import resolve


def run(app, backend):
    with app_executor(resolve({"backend": backend, "max_workers": 2}), app) as executor:
        return simulate("flower.other_ml:server", app, num_nodes=4, executor=executor, seed=0)


def weights(simulation):
    return [array.numpy() for array in simulation.result.arrays.values()]


@pytest.mark.thorough_but("numpy")
@pytest.mark.parametrize(("library", "app"), [("numpy", "other_ml"), ("sklearn", "other_ml_sklearn")])
def test_another_library_learns_the_digits_and_knows_no_torch(library, app):
    pytest.importorskip(library)
    runs = [run(f"flower.{app}:client", "standby") for _ in range(2)]
    assert runs[0].rounds[-1].metrics["accuracy"] > 0.85
    assert all(round_.failures == [] for round_ in runs[0].rounds)
    assert all(m["knows_torch"] == 0 for m in runs[0].result.train_metrics_clientapp.values())
    for left, right in zip(weights(runs[0]), weights(runs[1]), strict=True):
        np.testing.assert_array_equal(left, right)


def test_numpy_gives_the_same_bits_without_isolation():
    with fedexec.create_executor("inline") as executor:
        inline = simulate("flower.other_ml:server", "flower.other_ml:client", num_nodes=4, executor=executor)
    isolated = run("flower.other_ml:client", "standby")
    for left, right in zip(weights(inline), weights(isolated), strict=True):
        np.testing.assert_array_equal(left, right)
