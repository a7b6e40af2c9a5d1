"""What a run's rounds are when an app starts several strategies, an older one, a workflow, or none."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Parameters, ndarrays_to_parameters
from flwr.server import LegacyContext, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg as OlderFedAvg
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import fedexec
from fedexec.flower import Round, RunRecorder, TaskRecord, simulate
from fedexec.flower.flower_internals import DefaultWorkflow
from flower import apps, legacy


@pytest.fixture(scope="module")
def inline():
    with fedexec.create_executor("inline", max_workers=2) as executor:
        yield executor


def simulated(executor, main, client=apps.client, num_nodes=3):
    """Run an app with that main function; return the simulation, and what the recorder has told meanwhile."""
    told, app = [], ServerApp()
    app.main()(main)
    recorder = RunRecorder(
        lambda current, done, planned: told.append(
            (current.start, current.server_round, done, planned, bool(current.seconds))
        )
    )
    return simulate(app, client, num_nodes=num_nodes, executor=executor, recorder=recorder), told


def start(grid, rounds, kind=FedAvg, **options):
    strategy = kind(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    return strategy.start(grid, ArrayRecord([np.zeros(2, np.float32)]), num_rounds=rounds, **options)


def numbers(run):
    return [(current.start, current.server_round) for current in run.rounds]


def of_each(start_, rounds, nodes=3):
    """Return what is told of one start: each node's answer, then the end of the round."""
    return [
        (start_, server_round, min(done, nodes), rounds, done > nodes)
        for server_round in range(1, rounds + 1)
        for done in range(1, nodes + 2)
    ]


def test_each_start_of_a_strategy_has_rounds_and_progress_of_its_own(inline):
    results = []
    run, told = simulated(inline, lambda grid, context: results.extend([start(grid, 2), start(grid, 3)]))
    assert numbers(run) == [(1, 1), (1, 2), (2, 1), (2, 2), (2, 3)]
    assert all(current.clients == [0, 1, 2] for current in run.rounds)
    assert told == of_each(1, 2) + of_each(2, 3)
    assert [record.start for record in run.tasks] == [1] * 6 + [2] * 9
    assert run.result is results[1]
    assert run.arrays is results[1].arrays


def test_what_each_start_found_stands_with_its_rounds(inline):
    def evaluate(value):
        return lambda server_round, arrays: {"loss": value, "accuracy": value + server_round}

    def main(grid, context):
        start(grid, 1, evaluate_fn=evaluate(10.0))
        start(grid, 1, evaluate_fn=evaluate(20.0))

    run, _ = simulated(inline, main)
    assert numbers(run) == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [current.loss for current in run.rounds] == [10.0, 10.0, 20.0, 20.0]
    assert [current.metrics["accuracy"] for current in run.rounds] == [10.0, 11.0, 20.0, 21.0]


def test_a_start_that_calls_its_supers_twice_is_two(inline):
    class TwoPhases(FedAvg):
        def start(self, grid, initial_arrays, **options):  # type: ignore[override]
            first = super().start(grid, initial_arrays, **options)
            return super().start(grid, first.arrays, **options)

    run, told = simulated(inline, lambda grid, context: start(grid, 2, TwoPhases))
    assert numbers(run) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert told == of_each(1, 2) + of_each(2, 2)


def test_strategies_in_threads_at_once_are_kept_apart(inline):
    both = threading.Barrier(2, timeout=30)

    class Meeting(FedAvg):
        def configure_train(self, *args, **kwargs):
            both.wait()
            return super().configure_train(*args, **kwargs)

    def main(grid, context):
        threads = [threading.Thread(target=start, args=(grid, 2, Meeting)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run, told = simulated(inline, main)
    assert sorted(numbers(run)) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(current.clients == [0, 1, 2] for current in run.rounds)
    assert [entry for entry in told if entry[0] == 1] == of_each(1, 2)
    assert [entry for entry in told if entry[0] == 2] == of_each(2, 2)


def test_a_message_to_no_node_is_recorded_in_the_start_it_was_sent_in(inline):
    class Lost(FedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            content = RecordDict({"config": ConfigRecord({"server-round": server_round})})
            grid.send_and_receive([Message(content, 12345, "train")])
            return super().configure_train(server_round, arrays, config, grid)

    run, _ = simulated(inline, lambda grid, context: [start(grid, 1, Lost), start(grid, 1, Lost)])
    assert [record.start for record in run.tasks if record.error] == [1, 2]
    assert [failure["client"] for current in run.rounds for failure in current.failures] == [-1, -1]


def test_what_was_written_before_rounds_told_their_start_is_read():
    round_row, task_row = Round(1).as_dict(), TaskRecord("train", 0, 1, None).as_dict()
    for row in (round_row, task_row):
        del row["start"]
    assert Round(**round_row).start == 1
    assert TaskRecord.from_dict(task_row).start == 1


# ---------------------------------------------------------------- without a strategy


def send(grid, kind, server_round=None):
    config = {} if server_round is None else {"server-round": server_round}
    content = RecordDict({"arrays": ArrayRecord([np.zeros(2, np.float32)]), "config": ConfigRecord(config)})
    grid.send_and_receive([Message(content, node, kind) for node in grid.get_node_ids()])


def echoing():
    app = ClientApp()
    for register in (app.train, app.query):
        register()(lambda message, context: Message(message.content, reply_to=message))
    return app


@pytest.mark.parametrize("evaluate", [True, False])
def test_what_an_app_asks_before_it_starts_a_strategy_hides_no_progress(inline, evaluate):
    client = apps.client
    app = ClientApp()
    app.train()(lambda message, context: client(message, context))
    app.query()(lambda message, context: Message(message.content, reply_to=message))

    def main(grid, context):
        send(grid, "query")
        start(grid, 1, evaluate_fn=apps.evaluate_globally if evaluate else None)

    run, told = simulated(inline, main, app)
    assert numbers(run) == [(1, 0), (1, 1)]
    assert (run.rounds[0].loss is not None) == evaluate
    assert told == [(1, 0, 0, 1, True), *of_each(1, 1)]


def test_a_loop_of_the_apps_own_that_runs_twice_is_two_starts(inline):
    def main(grid, context):
        for _ in range(2):
            for server_round in (1, 2):
                send(grid, "train", server_round)

    run, told = simulated(inline, main, echoing())
    assert numbers(run) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(current.clients == [0, 1, 2] for current in run.rounds)
    assert [entry[:2] for entry in told if entry[4]] == numbers(run)


def test_a_node_that_trains_in_several_messages_of_a_round_is_one_client_of_it(inline):
    def main(grid, context):
        for _ in range(3):
            send(grid, "train", 1)

    run, _ = simulated(inline, main, echoing())
    assert [current.clients for current in run.rounds] == [[0, 1, 2]]


def test_a_train_message_that_tells_no_round_is_of_round_1(inline):
    def main(grid, context):
        send(grid, "query")
        send(grid, "train")
        send(grid, "query")

    run, _ = simulated(inline, main, echoing())
    assert [(current.server_round, current.clients) for current in run.rounds] == [(0, []), (1, [0, 1, 2])]


# ---------------------------------------------------------------- older apps


def accuracy_of(results):
    return {"accuracy": results[0][1]["accuracy"]}


class Measured(OlderFedAvg):
    def evaluate(self, server_round, parameters):
        return 1.0 / (server_round + 1), {"accuracy": 0.75}


def older_strategy(arrays, kind=Measured):
    return kind(initial_parameters=arrays, evaluate_metrics_aggregation_fn=accuracy_of)


def watched(app, executor, client=legacy.client):
    """Simulate an older app; return what was known of each round when it was over, and the simulation."""
    seen = []

    def progress(current, done, planned):
        if current.seconds:
            client_accuracy = current.client_metrics.get("accuracy")
            seen.append((current.server_round, current.loss, client_accuracy, planned))

    recorder = RunRecorder(progress)
    return seen, simulate(app, client, num_nodes=3, executor=executor, recorder=recorder)


WEIGHTS = ndarrays_to_parameters([np.zeros(2, np.float32)])


@pytest.mark.parametrize("how", ["server_fn", "workflow"])
def test_loss_and_clients_accuracy_of_an_older_app_are_known_when_its_round_is_over(inline, how):
    strategy, config = older_strategy(WEIGHTS), ServerConfig(num_rounds=2)
    if how == "server_fn":
        app = ServerApp(server_fn=lambda context: ServerAppComponents(strategy=strategy, config=config))
    else:
        app = ServerApp()

        @app.main()
        def main(grid, context):
            DefaultWorkflow()(grid, LegacyContext(context=context, config=config, strategy=strategy))

    seen, run = watched(app, inline)
    assert seen == [(0, 1.0, None, 2), (1, 1 / 2, 0.5, 2), (2, 1 / 3, 0.5, 2)]
    assert run.rounds[2].client_loss == dict(run.result.losses_distributed)[2]
    assert run.result.losses_centralized[2] == (2, 1 / 3)
    (weights,) = (array.numpy() for array in run.arrays.values())
    assert weights.shape == (2,)
    assert weights.any()


def test_an_older_strategy_that_overrides_an_evaluation_is_known_by_its_history(inline):
    def server_fn(context):
        class Own(OlderFedAvg):  # made when the run has begun
            def aggregate_evaluate(self, server_round, results, failures):
                return 0.25, {"accuracy": 0.125}

        return ServerAppComponents(strategy=older_strategy(WEIGHTS, Own), config=ServerConfig(num_rounds=1))

    _, run = watched(ServerApp(server_fn=server_fn), inline)
    assert (run.rounds[-1].client_loss, run.rounds[-1].client_metrics) == (0.25, {"accuracy": 0.125})


def test_a_model_that_is_no_arrays_is_left_as_its_bytes(inline):
    class Trees(OlderFedAvg):
        def aggregate_fit(self, server_round, results, failures):
            return Parameters(tensors=[b'{"tree": 1}'], tensor_type=""), {}

    def server_fn(context):
        strategy = Trees(fraction_evaluate=0.0, initial_parameters=WEIGHTS)
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=1))

    _, run = watched(ServerApp(server_fn=server_fn), inline)
    assert [array.numpy().tobytes() for array in run.arrays.values()] == [b'{"tree": 1}']


# ---------------------------------------------------------------- in a script

SCRIPT = """
import numpy as np
from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from fedexec.flower import offload, simulate

class Mine(FedAvg):
    name = "mine"
    def start(self, *args, **kwargs):
        return super().start(*args, **kwargs)

@offload
def evaluate(server_round, arrays):
    return MetricRecord({"loss": float(len(Mine.name))})

server = ServerApp()

@server.main()
def main(grid, context):
    Mine(fraction_evaluate=0.0).start(
        grid, ArrayRecord([np.zeros(2, np.float32)]), num_rounds=1, evaluate_fn=evaluate
    )

print([each.loss for each in simulate(server, "flower.apps:client", num_nodes=2).rounds])
"""


def test_a_strategy_of_a_script_travels_to_a_worker_while_it_is_listened_to():
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60,
        env=clean | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.stdout == "[4.0, 4.0]\n", done.stderr
