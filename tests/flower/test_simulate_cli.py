"""`fedexec simulate` as a person calls it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

APPS = ["flower.apps:server", "flower.apps:client"]
DIRECTORY = Path(__file__).parent / "offload_app"
TESTS = Path(__file__).parents[1]


def command(*argv, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")}
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return {
        "args": [sys.executable, "-m", "fedexec", "simulate", *argv],
        "env": clean | path | environment,
        "cwd": TESTS,
        "text": True,
    }


def run(*argv, **environment):
    return subprocess.run(**command(*argv, **environment), capture_output=True, timeout=120)


def result(*argv, **environment):
    done = run(*argv, "--json", "-", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_two_apps_by_name_with_progress_and_a_table(tmp_path):
    saved = tmp_path / "weights.npz"
    done = run(
        *APPS, "--nodes", "3", "--save", str(saved), "--backend", "inline",
        "--run-config", "num-rounds=1 evaluate=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "backend inline (flag)" in done.stdout
    assert "round 1/1  loss" in done.stdout
    assert "3 tasks in 1 processes" in done.stdout
    assert done.stderr == ""
    with np.load(saved) as weights:
        assert [weights[name].shape for name in weights] == [(3, 2), (4,)]


def test_a_directory_its_config_and_what_overrides_it(tmp_path):
    config = f"report='{tmp_path}/report.json' executor-max-workers=1"
    with pytest.raises(AssertionError, match="not present in the main dictionary"):
        result(str(DIRECTORY), "--nodes", "2", "--run-config", config)
    config = f"report='{tmp_path}/report.json'"
    told = result(str(DIRECTORY), "--nodes", "2", "--run-config", config)
    assert told["app"]["server"] == "offload_app.server_app:app"
    assert (told["settings"]["backend"], told["settings"]["sources"]["backend"]) == ("standby", "config")
    assert [round_["clients"] for round_ in told["rounds"]] == [[], [0, 1], [0, 1]]
    assert len(told["tasks"]) == 4
    assert told["stats"]["failed"] == 0
    by_variable = result(str(DIRECTORY), "--run-config", config, FEDEXEC_BACKEND="inline")
    assert by_variable["settings"]["sources"]["backend"] == "FEDEXEC_BACKEND"
    by_flag = result(str(DIRECTORY), "--run-config", config, "--backend", "inline", FEDEXEC_BACKEND="pool")
    assert by_flag["settings"]["sources"]["backend"] == "flag"


def test_the_same_seed_gives_the_same_weights():
    small = (*APPS, "--nodes", "6", "--run-config", "fraction=0.5")
    first, second, other = (result(*small, *more) for more in ([], ["--backend", "inline"], ["--seed", "1"]))
    assert first["weights_sha256"] == second["weights_sha256"] != other["weights_sha256"]


def test_a_node_that_fails_is_shown():
    config = "culprits='1' how='kill' num-rounds=2"
    done = run("flower.apps:server", "flower.apps:faulty", "--nodes", "3", "--run-config", config)
    assert done.returncode == 0, done.stderr
    assert "client 1: WorkerDiedError" in done.stdout.replace("\n", " ")
    assert "1 died" in done.stdout


def test_what_the_apps_own_code_raises_is_shown_with_where():
    config = "num-rounds='many'"
    done = run(*APPS, "--run-config", config)
    assert done.returncode == 1
    assert "apps.py" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fedexec: error: the ServerApp raised ValueError")


def test_a_strategy_that_would_wait_for_ever_is_one_line():
    done = run(*APPS, "--nodes", "3", "--run-config", "min-nodes=5")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "FedAvg waits for 5 nodes (min_train_nodes=5), but there are 3" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_everything(number):
    running = subprocess.Popen(
        **command("flower.apps:server", "flower.apps:hanging", "--nodes", "4"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
    )  # fmt: skip
    for line in running.stdout:
        if line.strip() == "hanging":
            break
    family = psutil.Process(running.pid).children(recursive=True)
    assert family
    os.killpg(running.pid, number)
    _, errors = running.communicate(timeout=20)
    assert running.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in errors
    assert psutil.wait_procs(family, timeout=5)[1] == []
