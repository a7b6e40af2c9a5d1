"""Seeds and torch, which a worker imports before, with or during its task."""

import pytest

import fedexec

pytestmark = pytest.mark.torch


def draw_of_torch():
    import torch

    return float(torch.rand(1)), torch.randperm(8).tolist()


@pytest.mark.thorough
def test_torch_follows_from_the_seed_whenever_it_is_imported():
    drawn = []
    for preload in ((), ("torch",)):
        with fedexec.create_executor("standby", max_workers=1, seed=3, preload=preload) as executor:
            drawn.append([executor.submit(draw_of_torch).result() for _ in range(2)])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]


@pytest.mark.thorough_but("standby")
@pytest.mark.parametrize("backend", ["standby", "pool", "process", "loky"])
def test_workers_of_a_template_with_torch_draw_different_numbers(backend):
    with fedexec.create_executor(backend, max_workers=2, preload=["torch"]) as executor:
        drawn = [future.result()[0] for future in [executor.submit(draw_of_torch) for _ in range(5)]]
    assert len(set(drawn)) == 5
