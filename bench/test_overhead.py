"""What a task that does nothing costs, in a process with torch imported."""

import time

import pytest
from peers import CONTESTANTS, contestant
from tasks import nothing

SLOW = {"tutorial", "ppe-spawn", "ray-fresh"}  # seconds a task
GAP = 0.1  # seconds between two tasks of the latency test, as between two messages of a server


@pytest.mark.benchmark(group="no-op, one now and then")
@pytest.mark.parametrize("name", CONTESTANTS)
def test_latency(benchmark, name):
    with contestant(name) as caller:
        caller.call(nothing)
        benchmark.pedantic(
            caller.call, args=(nothing,), setup=lambda: time.sleep(GAP), rounds=3 if name in SLOW else 40
        )


@pytest.mark.benchmark(group="no-op, back to back (20 tasks)")
@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name not in SLOW])
def test_throughput(benchmark, name):
    def twenty():
        for future in [caller.submit(nothing) for _ in range(20)]:
            future.result()

    with contestant(name) as caller:
        caller.call(nothing)
        benchmark.pedantic(twenty, rounds=7, warmup_rounds=1)
