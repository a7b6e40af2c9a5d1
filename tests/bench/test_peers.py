"""Who takes part beside our backends computes the same; each that is installed here."""

from importlib.metadata import requires, version

import pytest

from fedexec._bench.peers import COPY, FORK, contestants
from fedexec._bench.plan import Part
from fedexec._bench.running import LIMIT_SECONDS, measure
from fedexec._report.schema import KEY

LIMIT = LIMIT_SECONDS["smoke"]  # of one part: each process of the tutorial's imports torch anew
PEERS = [name for name, one in contestants().items() if one.peer and name not in (COPY, FORK)]


def found(group, strategy):
    """Return what is told of two clients that compute, or of one of four that is killed."""
    part = Part(group=group, strategy=strategy, workload="numpy", clients=2, workers=2)
    (benchmark,) = measure([part], LIMIT)
    assert "error" not in benchmark, benchmark
    return benchmark["extra_info"][KEY]


@pytest.mark.timeout(2 * LIMIT + 60)  # there are two parts, and each is to tell itself that it hangs
@pytest.mark.thorough_but("plain-loky")
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_computes_what_our_baseline_does(name):
    if reason := contestants()[name].missing:
        pytest.skip(reason)
    assert found("round", name)["digest"] == found("round", "inline")["digest"]


@pytest.mark.timeout(LIMIT + 60)
def test_flowers_own_engine_lets_one_death_hurt_others():
    if reason := contestants()["flower-ray"].missing:
        pytest.skip(reason)
    wanted = next(each for each in requires("flwr") or () if each.startswith("ray"))
    if f"=={version('ray')}" not in wanted:
        pytest.skip(f"Flower's engine is made for another Ray: {wanted}")
    assert found("faults", "flower-ray")["faults"]["survived"] < 3
