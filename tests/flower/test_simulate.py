"""`simulate`: whole apps, unchanged, on an executor; what they leave; what is said when they cannot run."""

import os
import signal
import subprocess
import sys
import textwrap
import tracemalloc

import numpy as np
import psutil
import pytest
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.exception import InconsistentMessageReplies
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg, Result

import fedexec
from fedexec.flower import TooFewNodesError, simulate
from fedexec.flower.flower_internals import LoadClientAppError, LoadServerAppError
from fedexec.flower.simulation.simulate import app_executor
from fedexec.settings import resolve
from flower import apps, legacy

BACKENDS = ["inline", "standby", "process", "loky"]


@pytest.fixture(scope="module")
def inline():
    with fedexec.create_executor("inline", max_workers=2) as executor:
        yield executor


@pytest.fixture(scope="module")
def standby():
    with app_executor(resolve({"backend": "standby", "max_workers": 2}), "flower.apps:client") as executor:
        yield executor


def arrays(simulation):
    return [array.numpy() for array in simulation.result.arrays.values()]


def test_a_run_leaves_its_result_its_rounds_and_what_each_message_cost(standby):
    config = {"num-rounds": 2, "evaluate": True, "fraction-evaluate": 0.5}
    run = simulate(
        "flower.apps:server", "flower.apps:client", num_nodes=4, executor=standby, run_config=config
    )
    assert isinstance(run.result, Result)
    assert [round_.server_round for round_ in run.rounds] == [0, 1, 2]
    assert [round_.clients for round_ in run.rounds] == [[], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert run.rounds[2].metrics["accuracy"] == 0.5
    assert run.rounds[2].loss == pytest.approx(sum(array.sum() for array in arrays(run)))
    assert set(run.rounds[1].client_metrics) == {"loss"}
    assert [record.kind for record in run.tasks].count("train") == 8
    assert [record.kind for record in run.tasks].count("evaluate") == 4
    assert all(record.usage and (record.usage.peak_host_bytes or 0) > 0 for record in run.tasks)
    assert run.context.run_config == config


def test_backends_agree_to_the_bit_when_some_nodes_are_sampled():
    results = []
    for backend in BACKENDS:
        with fedexec.create_executor(backend, max_workers=3, preload=["flower.apps"]) as executor:
            run = simulate(
                "flower.apps:server", "flower.apps:client", num_nodes=9, executor=executor, seed=3,
                run_config={"num-rounds": 3, "fraction": 0.4},
            )  # fmt: skip
        results.append((arrays(run), [round_.clients for round_ in run.rounds]))
    reference, sampled = results[0]
    assert [len(clients) for clients in sampled] == [3, 3, 3]
    assert len({tuple(clients) for clients in sampled}) > 1
    for other, other_sampled in results[1:]:
        assert other_sampled == sampled
        for left, right in zip(reference, other, strict=True):
            np.testing.assert_array_equal(left, right)


def test_another_seed_samples_other_nodes(inline):
    runs = [
        simulate(
            apps.server, apps.client, num_nodes=9, executor=inline, seed=seed, run_config={"fraction": 0.4}
        )
        for seed in (0, 1)
    ]
    assert [r.clients for r in runs[0].rounds] != [r.clients for r in runs[1].rounds]


@pytest.mark.thorough
def test_a_server_that_is_the_first_to_use_numpy_draws_what_follows_from_the_seed():
    code = """
from flwr.serverapp import ServerApp
from fedexec.flower import simulate
import sys
server = ServerApp()

@server.main()
def main(grid, context):
    had = "numpy.random" in sys.modules
    import numpy.random
    print(had, numpy.random.rand())

simulate(server, "flower.apps:client", num_nodes=1, seed=5)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "FEDEXEC_BACKEND": "standby"}
    command = [sys.executable, "-c", code]
    runs = [subprocess.run(command, env=env, capture_output=True, text=True, timeout=60) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert float(runs[0].stdout.split()[1]) > 0


def test_an_app_that_fails_at_import_is_reported_with_file_and_line(tmp_path, monkeypatch):
    (tmp_path / "helper_of_app.py").write_text("TABLE = {}\nTABLE['missing']\n")
    (tmp_path / "app_with_helper.py").write_text("import helper_of_app\n")
    monkeypatch.syspath_prepend(tmp_path)
    place = r"KeyError: 'missing' \(.*helper_of_app.py, line 2\)"
    with pytest.raises(LoadClientAppError, match=place):
        simulate("flower.apps:server", "app_with_helper:app", num_nodes=1)
    with pytest.raises(LoadServerAppError, match=place):
        simulate("app_with_helper:app", "flower.apps:client", num_nodes=1)


@pytest.mark.parametrize("backend", ["inline", "standby"])
def test_an_app_from_before_the_message_api_runs(backend):
    with fedexec.create_executor(backend, max_workers=2, preload=["flower.legacy"]) as executor:
        runs = [
            simulate(legacy.server, legacy.client, num_nodes=5, executor=executor, seed=0) for _ in range(2)
        ]
    histories = [run.result.losses_centralized for run in runs]
    assert histories[0] == histories[1], "aggregated in another order"
    assert len(histories[0]) == 3
    assert [round_.server_round for round_ in runs[0].rounds] == [0, 1, 2]
    assert runs[0].rounds[1].clients == [0, 1, 2, 3, 4]
    assert runs[0].rounds[2].loss == histories[0][2][1]
    assert runs[0].rounds[2].metrics == {"accuracy": 0.5}


def test_a_node_killed_in_round_1_is_one_failure_there_and_alive_in_round_2(standby):
    config = {"culprits": "2", "how": "kill", "num-rounds": 2}
    run = simulate(apps.server, apps.faulty, num_nodes=5, executor=standby, run_config=config)
    assert [[failure["client"] for failure in round_.failures] for round_ in run.rounds] == [[2], []]
    assert run.rounds[1].clients == [0, 1, 2, 3, 4]
    assert run.stats.worker_deaths == 1


def test_a_strategy_that_overrides_start_is_listened_to_once(inline):
    class Mine(FedAvg):
        def start(self, grid, initial_arrays, **options):  # type: ignore[override]
            return super().start(grid, initial_arrays, **options)

    app = ServerApp()

    @app.main()
    def main(grid, context):
        strategy = Mine(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        strategy.start(
            grid, ArrayRecord([np.ones(2)]), num_rounds=1, evaluate_fn=apps.evaluate_globally
        )  # fmt: skip

    original = vars(Mine)["start"]
    run = simulate(app, apps.client, num_nodes=2, executor=inline)
    assert isinstance(run.result, Result)
    assert [round_.server_round for round_ in run.rounds] == [0, 1]
    assert vars(Mine)["start"] is original


@pytest.mark.thorough
def test_memory_does_not_grow_with_the_nodes_that_are_only_registered(inline):
    def peak(num_nodes, fraction):
        config = {"num-rounds": 3, "fraction": fraction}
        tracemalloc.start()
        try:
            simulate(apps.server, apps.client, num_nodes=num_nodes, executor=inline, run_config=config)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(10_000, 0.005) - peak(50, 1.0) < 4 << 20


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("app", "says"),
    [
        ("flower.apps:nobody", "'flower.apps:nobody' cannot be loaded: AttributeError"),
        ("flower.apps", "is not written like package.module:attribute"),
        ("flower.apps:client", "is not a ServerApp, it is a ClientApp"),
        (ServerApp(), "has nothing to run: give it a function with @app.main()"),
    ],
)
def test_a_server_app_that_is_none(inline, app, says):
    with pytest.raises(LoadServerAppError, match="ServerApp") as caught:
        simulate(app, apps.client, num_nodes=2, executor=inline)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("app", "says"),
    [
        ("flower.apps:nobody", "'flower.apps:nobody' cannot be loaded: AttributeError"),
        ("flower.apps:server", "is not a ClientApp, it is a ServerApp"),
    ],
)
def test_a_client_app_that_is_none(standby, app, says):
    with pytest.raises(LoadClientAppError) as caught:
        simulate(apps.server, app, num_nodes=2, executor=standby)
    assert says in str(caught.value)
    with pytest.raises(LoadClientAppError):
        simulate(apps.server, app, num_nodes=2)


@pytest.mark.thorough_but("standby")
@pytest.mark.parametrize("backend", ["inline", "standby"])
def test_an_app_that_exits_while_it_is_imported_is_one_that_cannot_be_loaded(backend, tmp_path, monkeypatch):
    source = "import argparse\nargparse.ArgumentParser().parse_args(['of', 'another', 'program'])\n"
    (tmp_path / "reads_arguments.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FEDEXEC_BACKEND", backend)
    with pytest.raises(LoadClientAppError, match="'reads_arguments:app' cannot be loaded: SystemExit: 2"):
        simulate(apps.server, "reads_arguments:app", num_nodes=2)
    with pytest.raises(LoadServerAppError, match="'reads_arguments:app' cannot be loaded: SystemExit: 2"):
        simulate("reads_arguments:app", apps.client, num_nodes=2)


def test_an_app_that_does_not_pickle_says_what_to_do(standby):
    import threading

    lock = threading.Lock()
    app = ClientApp()
    app.train()(lambda message, context: lock)  # type: ignore[arg-type, return-value]
    with pytest.raises(LoadClientAppError, match="Make it in a module of its own"):
        simulate(apps.server, app, num_nodes=2, executor=standby)


@pytest.mark.parametrize("app", [apps.server, legacy.server], ids=["message API", "legacy"])
def test_a_strategy_that_waits_for_more_nodes_than_there_are_does_not_hang(inline, app):
    client = apps.client if app is apps.server else legacy.client
    with pytest.raises(TooFewNodesError, match=r"FedAvg waits for 30 nodes \(min_available_.*there are 3"):
        simulate(app, client, num_nodes=3, executor=inline, run_config={"min-available": 30})


def test_a_strategy_inside_another_is_asked_too(inline):
    app = ServerApp()

    @app.main()
    def main(grid, context):
        inner = FedAvg(min_train_nodes=9)
        DifferentialPrivacyServerSideFixedClipping(inner, 0.1, 1.0, 9).start(grid, ArrayRecord([np.ones(2)]))

    with pytest.raises(TooFewNodesError, match="min_train_nodes=9"):
        simulate(app, apps.client, num_nodes=3, executor=inline)


def test_what_the_server_app_raises_arrives(inline):
    app = ClientApp()
    app.train()(
        lambda message, context: Message(RecordDict({"metrics": MetricRecord({"a": 1})}), reply_to=message)
    )
    with pytest.raises(InconsistentMessageReplies):
        simulate(apps.server, app, num_nodes=3, executor=inline)


def test_no_nodes_is_an_error(inline):
    with pytest.raises(ValueError, match="num_nodes must be at least 1, got 0"):
        simulate(apps.server, apps.client, num_nodes=0, executor=inline)


def test_an_app_without_the_function_that_is_asked_for_is_an_error_of_each_node(standby):
    run = simulate(apps.server, ClientApp(), num_nodes=2, executor=standby, run_config={"num-rounds": 1})
    reasons = [failure["reason"] for failure in run.rounds[0].failures]
    assert len(reasons) == 2
    assert "No train function registered" in reasons[0]


# ---------------------------------------------------------------- from a script


SCRIPT = """
    import os, sys, time
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    import numpy as np
    from fedexec.flower import offload, simulate
    from fedexec.testing.leaks import new_children

    client, server = ClientApp(), ServerApp()

    @client.train()
    @offload
    def train(message, context):
        if sys.argv[1] == "hang":
            os.write(1, b"hanging\\n")
            time.sleep(3600)
        metrics = MetricRecord({"num-examples": 1, "pid": os.getpid(), "parent": os.getppid()})
        return Message(RecordDict({"a": message.content["arrays"], "m": metrics}), reply_to=message)

    @server.main()
    def main(grid, context):
        strategy = FedAvg(fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord([np.ones(3)]), num_rounds=1)

    print("begins", flush=True)
    before = new_children()
    print(simulate(server, client, num_nodes=3).rounds[0].failures)
    print("left:", new_children(before))
"""


def script(*args):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0,
        env=clean | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def test_apps_made_in_a_script_run_once_and_leave_nothing():
    output, errors = script("run").communicate(timeout=60)
    assert output.splitlines() == ["begins", "[]", "left: set()"], errors


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_a_script_that_is_ended(number):
    running = script("hang")
    for line in running.stdout:
        if line.strip() == "hanging":
            break
    family = psutil.Process(running.pid).children(recursive=True)
    os.killpg(running.pid, number)
    try:
        running.communicate(timeout=30)
    finally:
        running.kill()
    assert running.returncode in (-number, 130, 1)
    assert psutil.wait_procs(family, timeout=5)[1] == []
