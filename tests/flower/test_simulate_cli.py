"""`fedexec simulate` as a person calls it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
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
    return subprocess.run(**command(*argv, **environment), capture_output=True, timeout=280)


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
    assert "3 tasks in 1 process; none failed" in done.stdout
    assert done.stderr == ""
    with np.load(saved) as weights:
        assert [weights[name].shape for name in weights] == [(3, 2), (4,)]


@pytest.mark.parametrize(("culprits", "failed"), [("0,1", True), ("0", False)])
def test_a_run_in_which_no_client_has_trained_has_failed(culprits, failed):
    config = f"num-rounds=1 how='raise' culprits='{culprits}'"
    done = run(
        "flower.apps:server", "flower.apps:faulty", "--nodes", "2", "--backend", "inline",
        "--run-config", config,
    )  # fmt: skip
    assert ("no client has trained without an error" in done.stderr) is failed
    assert done.returncode == int(failed)
    assert re.search(r"ValueError: no data today \(.*/apps.py, line \d+\)", done.stderr)


def test_a_directory_its_config_and_what_overrides_it(tmp_path):
    config = f"report='{tmp_path}/report.json' executor-max-workers=1"
    with pytest.raises(AssertionError, match="did you mean 'executor-backend'"):
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


@pytest.mark.thorough
def test_an_app_whose_package_lies_under_src_runs_without_being_installed(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "offload_app").symlink_to(DIRECTORY / "offload_app")
    (tmp_path / "pyproject.toml").write_text((DIRECTORY / "pyproject.toml").read_text())
    told = result(str(tmp_path), "--nodes", "2", "--run-config", f"report='{tmp_path}/report.json'")
    assert [round_["clients"] for round_ in told["rounds"]] == [[], [0, 1], [0, 1]]


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_what_the_apps_own_code_raises_is_shown_with_where():
    config = "num-rounds='many'"
    done = run(*APPS, "--run-config", config)
    assert done.returncode == 1
    assert "apps.py" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("fedexec: error: the ServerApp raised ValueError")


@pytest.mark.thorough
def test_a_strategy_that_would_wait_for_ever_is_one_line():
    done = run(*APPS, "--nodes", "3", "--run-config", "min-nodes=5")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "FedAvg waits for 5 nodes (min_train_nodes=5), but there are 3" in done.stderr


def test_each_start_of_a_strategy_is_shown_and_written_for_itself(tmp_path):
    app = directory(tmp_path, server="""
        def main(grid, context):
            for rounds in (2, 1):
                strategy = FedAvg(fraction_evaluate=0.0)
                strategy.start(grid, ArrayRecord([np.zeros(2, np.float32)]), num_rounds=rounds)
    """)  # fmt: skip
    done = run(app, "--nodes", "2", "--backend", "inline", "--json", str(tmp_path / "result.json"))
    assert done.returncode == 0, done.stderr
    shown = [line.partition("  ")[0] for line in done.stdout.splitlines() if line.endswith(" s")]
    assert shown == ["round 1/2", "round 2/2", "start 2, round 1/1"]
    told = json.loads((tmp_path / "result.json").read_text())
    numbers = [(round_["start"], round_["server_round"], round_["clients"]) for round_ in told["rounds"]]
    assert numbers == [(1, 1, [0, 1]), (1, 2, [0, 1]), (2, 1, [0, 1])]
    assert [task["start"] for task in told["tasks"]] == [1, 1, 1, 1, 2, 2]


def test_the_weights_of_an_older_app_are_saved(tmp_path):
    saved = tmp_path / "weights.npz"
    older = ["flower.legacy:server", "flower.legacy:client", "--nodes", "2", "--backend", "inline"]
    told = result(*older, "--save", str(saved))
    with np.load(saved) as weights:
        assert [weights[name].shape for name in weights] == [(3, 2), (4,)]
    assert len(told["weights_sha256"]) == 64


# ---------------------------------------------------------------- what an app's directory says


def directory(path, *, server="def main(grid, context): pass", client="", settings=""):
    """Write a Flower app, and return where it is."""
    name = "app_of_test"
    (path / "pyproject.toml").write_text(f"""
[project]
name = "{name}"
version = "1.0.0"
license = "Apache-2.0"
[tool.flwr.app]
publisher = "me"
[tool.flwr.app.components]
serverapp = "{name}:server"
clientapp = "{name}:client"
{settings}
""")
    module = f"""
from logging import INFO, WARNING
import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.logger import log
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flower import apps

{textwrap.dedent(server)}
server, client = ServerApp(), ClientApp()
server.main()(main)
client.train()(lambda message, context: apps.train(message, context))

@client.query()
def query(message, context):
    partition = context.node_config["partition-id"]
{textwrap.indent(textwrap.dedent(client), "    ")}
    return Message(RecordDict(), reply_to=message)
"""
    (path / f"{name}.py").write_text(module)
    return str(path)


FEDERATION = """
[tool.flwr.federations]
default = "local"
[tool.flwr.federations.local]
options.num-supernodes = {number}
[tool.flwr.federations.remote]
address = "127.0.0.1:9093"
"""


@pytest.mark.thorough_but("2 nodes (flag)")
@pytest.mark.parametrize(
    ("settings", "flags", "said"),
    [
        (FEDERATION.format(number=3), [], "3 nodes (pyproject.toml)"),
        (FEDERATION.format(number=3), ["--nodes", "2"], "2 nodes (flag)"),
        (FEDERATION.format(number=3).replace('"local"', '"remote"'), [], "10 nodes (default)"),
        (FEDERATION.format(number=3), ["--federation", "remote"], "10 nodes (default)"),
        ("", [], "10 nodes (default)"),
    ],
)
def test_how_many_nodes_there_are_and_who_chose_that(tmp_path, settings, flags, said):
    app = directory(tmp_path, server="""
        def main(grid, context):
            print("there are", len(list(grid.get_node_ids())))
    """, settings=settings)  # fmt: skip
    done = run(app, "--backend", "inline", *flags)
    assert done.stdout.startswith(f"{said}, backend inline (flag)")
    assert f"there are {said.split()[0]}\n" in done.stdout


def test_a_federation_that_the_file_does_not_have_is_a_usage_error(tmp_path):
    app = directory(tmp_path, settings=FEDERATION.format(number=3))
    done = run(app, "--federation", "locale")
    assert done.returncode == 2
    assert "it has no federation 'locale'; there is: local, remote" in done.stderr


RESOURCES = """
options.backend.client-resources.num-cpus = {cpus}
options.backend.client-resources.num-gpus = 0.25
[tool.flwr.federations.remote]"""


def test_what_each_client_asks_for_bounds_how_many_run_at_once(tmp_path):
    asked = FEDERATION.format(number=3).replace("\n[tool.flwr.federations.remote]", RESOURCES)
    app = directory(tmp_path, settings=asked.format(cpus=1 << 20))
    done = run(app, "--backend", "process")
    assert "3 nodes (pyproject.toml), backend process (flag), 1 workers" in done.stdout
    assert "the app asks for 0.25 GPU(s) for each client; there is none" in done.stderr
    assert "3 workers" in run(app, "--backend", "process", "--max-workers", "3").stdout
    with_device = {"FEDEXEC_DEVICE": "emulated:1GiB"}
    assert "1 workers" in run(app, "--backend", "process", **with_device).stdout
    app = directory(tmp_path, settings=asked.format(cpus=0.01))
    assert "4 workers" in run(app, "--backend", "process", **with_device).stdout
    done = run(directory(tmp_path, settings=asked.format(cpus="'two'")))
    assert done.returncode == 2
    assert "options.backend.client-resources.num-cpus must be a number, got 'two'" in done.stderr


def test_an_installed_app_is_found_by_its_name(tmp_path):
    (tmp_path / "made").mkdir()
    made = directory(tmp_path / "made")
    for version in ("1.0.0", "2.0.0"):
        shutil.copytree(made, tmp_path / "apps" / f"me.my-app.{version}.1a2b3c4d")
    home = {"FLWR_HOME": str(tmp_path)}
    assert run("@me/my-app==2.0.0", "--nodes", "1", "--backend", "inline", **home).returncode == 0
    done = run("me/my-app", **home)
    assert done.returncode == 2
    assert (
        "installed more than once: me.my-app.1.0.0.1a2b3c4d, me.my-app.2.0.0.1a2b3c4d; add ==" in done.stderr
    )
    done = run("me/other", **home)
    assert done.returncode == 2
    assert "'me/other' is neither a directory nor an app that is installed in" in done.stderr


def test_a_number_of_nodes_beyond_all_bounds_is_a_usage_error(tmp_path):
    done = run(directory(tmp_path, settings=FEDERATION.format(number=12345678901)))
    assert done.returncode == 2
    assert "options.num-supernodes in pyproject.toml must be at most 1,000,000" in done.stderr


@pytest.mark.thorough_but("'many'")
@pytest.mark.parametrize("number", ["0", "'many'", "true", "2.5"])
def test_a_number_of_nodes_that_is_none_is_a_usage_error(tmp_path, number):
    done = run(directory(tmp_path, settings=FEDERATION.format(number=number)))
    assert done.returncode == 2
    assert "options.num-supernodes must be an integer of at least 1, got " in done.stderr


@pytest.mark.thorough_but("standby")
@pytest.mark.parametrize("backend", ["standby", "pool", "process", "loky", "inline"])
def test_what_an_app_logs_is_shown_wherever_it_runs_and_each_round_of_flowers_server_is_not(
    tmp_path, backend
):
    app = directory(tmp_path, server="""
        def main(grid, context):
            log(INFO, "server, for information")
            log(WARNING, "server, a warning")
            grid.send_and_receive([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])
            strategy = FedAvg(fraction_evaluate=0.0)
            strategy.start(grid, ArrayRecord([np.zeros(2, np.float32)]), num_rounds=1)
    """, client="""
        log(INFO, "client %s, for information", partition)
        log(WARNING, "client %s, a warning", partition)
    """)  # fmt: skip
    done = run(app, "--nodes", "2", "--backend", backend)
    assert done.returncode == 0, done.stderr
    told = [line.split("\x1b[0m:")[-1].strip() for line in done.stderr.splitlines()]
    assert told[:2] == ["server, for information", "server, a warning"]
    of_clients = [
        f"client {client}, {what}" for client in (0, 1) for what in ("a warning", "for information")
    ]
    assert sorted(told[2:]) == of_clients


@pytest.mark.thorough_but("standby")
@pytest.mark.parametrize("backend", ["standby", "process", "inline"])
def test_where_it_is_quiet_no_information_of_an_app_is_shown(tmp_path, backend):
    app = directory(tmp_path, server="""
        import logging
        logging.basicConfig()
        mine = logging.getLogger("mine")
        mine.setLevel(INFO)
        log(INFO, "module, for information")

        def main(grid, context):
            log(INFO, "server, for information")
            log(WARNING, "server, a warning")
            mine.info("mine, for information")
            grid.send_and_receive([Message(RecordDict(), node, "query") for node in grid.get_node_ids()])
    """, client="""
        log(INFO, "client, for information")
        mine.info("mine, for information")
        mine.warning("client, a warning")
    """)  # fmt: skip
    done = run(app, "--nodes", "1", "--backend", backend, "-q")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "for information" not in done.stderr
    assert "server, a warning" in done.stderr and "client, a warning" in done.stderr


def test_flowers_server_is_heard_where_that_is_asked_for():
    done = run(*APPS, "--nodes", "2", "--backend", "inline", "--flower-log")
    assert "[ROUND 1/2]" in done.stderr


@pytest.mark.parametrize(("where", "backend"), [("server", "standby"), ("client", "inline")])
def test_what_an_app_forks_in_the_commands_process_is_ended_as_anywhere(tmp_path, where, backend):
    ending = "print('exit code', apps.end_a_fork())"
    asking = "grid.send_and_receive([Message(RecordDict(), node, 'query') for node in grid.get_node_ids()])"
    server = f"def main(grid, context):\n    {ending if where == 'server' else asking}"
    app = directory(tmp_path, server=server, client=ending if where == "client" else "")
    done = run(app, "--nodes", "1", "--backend", backend)
    assert "exit code -15\n" in done.stdout
    assert done.stderr == ""


@pytest.mark.thorough_but("2")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_everything(number):
    running = subprocess.Popen(
        **command("flower.apps:server", "flower.apps:hanging", "--nodes", "4"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
    )  # fmt: skip
    assert running.stdout is not None
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
