"""A run whose clients fail, killed and resumed; `rounds.py` does it at length."""

import pytest
from rounds import FAULTY, failures, run, run_killed_and_resumed

pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")
pytestmark = pytest.mark.torch


@pytest.mark.thorough
def test_a_killed_run_that_is_resumed_ends_as_one_that_was_not(tmp_path):
    options = ("--clients", "5", "--fit-clients", "3", "--rounds", "5", "--epochs", "1")
    whole = run(FAULTY, tmp_path, *options)
    resumed = run_killed_and_resumed(FAULTY, tmp_path, 2, *options)
    assert failures(whole), "some client should have failed"
    assert resumed["resumed_from"] >= 2
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    for left, right in zip(whole["rounds"], resumed["rounds"], strict=True):
        assert (left["loss"], left["clients"]) == (right["loss"], right["clients"])
