"""What it costs to send arrays: 100 MB of float32, as ten arrays of 10 MB."""

import numpy as np
import pytest
from peers import CONTESTANTS, contestant
from tasks import give_back, read

SHARING = [name for name in CONTESTANTS if name not in ("fork", "inline")]


def model(seed=0):
    """Return the weights of a model of 25 million parameters."""
    rng = np.random.default_rng(seed)
    return [rng.random(2_500_000, dtype=np.float32) for _ in range(10)]


@pytest.mark.benchmark(group="100 MB there and back")
@pytest.mark.parametrize("name", SHARING)
def test_there_and_back(benchmark, name):
    arrays = model()

    def call():
        result = caller.call(give_back, arrays)
        checks.append(float(result[-1][-1]) == float(arrays[-1][-1]))

    def touch():  # another round, other weights: nothing may be remembered
        arrays[0][0] += 1
        arrays[-1][-1] += 1

    checks = []
    with contestant(name) as caller:
        caller.call(give_back, arrays)
        benchmark.pedantic(
            call, setup=touch, rounds=3 if name in ("tutorial", "ppe-spawn", "ray-fresh") else 9
        )
    assert all(checks)


@pytest.mark.benchmark(group="100 MB there and back")
def test_bare_copy(benchmark):
    arrays = model()
    benchmark.pedantic(lambda: [array.copy() for array in arrays], rounds=15, warmup_rounds=2)


@pytest.mark.benchmark(group="100 MB to clients that read every page")
@pytest.mark.parametrize("clients", [1, 8])
@pytest.mark.parametrize("name", ["standby"])
def test_clients_that_read(benchmark, name, clients):
    arrays = model()

    def round_():
        for future in [caller.submit(read, arrays) for _ in range(clients)]:
            future.result()

    def touch():
        arrays[0][0] += 1

    with contestant(name, workers=2) as caller:
        caller.call(read, arrays)
        benchmark.pedantic(round_, setup=touch, rounds=15, warmup_rounds=1)
