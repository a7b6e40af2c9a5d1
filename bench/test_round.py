"""A round of ten real fits on the digits, two at a time."""

import pytest
from peers import CONTESTANTS, contestant
from tasks import fit

from fedexec.workload import training

FITTING = [name for name in CONTESTANTS if name not in ("fork", "inline")]


def ten_fits(caller, epochs):
    weights = training.initial_weights(0)
    examples = [
        future.result() for future in [caller.submit(fit, weights, client, epochs) for client in range(10)]
    ]
    assert sum(examples) == 1437


@pytest.mark.benchmark(group="round of ten fits, one epoch each")
@pytest.mark.parametrize("name", FITTING)
def test_short_fits(benchmark, name):
    with contestant(name, workers=2) as caller:
        benchmark.pedantic(
            ten_fits, args=(caller, 1), rounds=1 if name in ("tutorial", "ppe-spawn", "ray-fresh") else 5,
            warmup_rounds=0 if name in ("tutorial", "ppe-spawn", "ray-fresh") else 1,
        )  # fmt: skip


@pytest.mark.benchmark(group="round of ten fits of about half a second")
@pytest.mark.parametrize("name", [name for name in ("standby", "plain-loky", "loky") if name in CONTESTANTS])
def test_half_second_fits(benchmark, name):
    with contestant(name, workers=2) as caller:
        benchmark.pedantic(ten_fits, args=(caller, 25), rounds=5, warmup_rounds=1)
