"""All benchmarks: one test for each part of the plan; see fedexec/_bench/plan.py."""

import pytest

from fedexec._bench.measurements import open_session
from fedexec._report.schema import KEY


@pytest.fixture
def measure(benchmark, part):
    """Return a function that times a part's rounds and records its other measurements."""

    def run():
        benchmark.group = part.group
        with open_session(part) as session:
            benchmark.pedantic(
                session.call, setup=session.setup, rounds=part.rounds, warmup_rounds=part.warmup_rounds
            )
        benchmark.extra_info[KEY] = session.record().as_dict()

    return run


def test_start_up(measure):
    measure()


def test_overhead(measure):
    measure()


def test_transport(measure):
    measure()


def test_round(measure):
    measure()


def test_footprint(measure):
    measure()


def test_scaling(measure):
    measure()


def test_faults(measure):
    measure()
