"""Thirty rounds in which every client fails with probability 0.2, beside the same without: ``make soak``.

Ends with 1 if the accuracies differ by more than three points.
"""

import os
import random
import signal
import sys
from collections import Counter

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedexec.flower import simulate
from fedexec.workload import training
from fedexec.workload.data import DataSpec

NODES, ROUNDS, PROBABILITY, POINTS = 10, 30, 0.2, 0.03
TRAINING = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02}

client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Fail, or train."""
    partition, server_round = context.node_config["partition-id"], message.content["config"]["server-round"]
    chance = random.Random(f"{partition}/{server_round}")
    if chance.random() < context.run_config["probability"]:
        chance.choice([_raise, _exit, _kill])()
    weights, examples, metrics = training.train(
        message.content["arrays"].to_numpy_ndarrays(), TRAINING | {"server_round": server_round},
        data=DataSpec(clients=NODES), client=partition,
    )  # fmt: skip
    record = MetricRecord({**metrics, "num-examples": examples})
    return Message(RecordDict({"arrays": ArrayRecord(weights), "metrics": record}), reply_to=message)


def _raise() -> None:
    raise RuntimeError("this client fails")


def _exit() -> None:
    os._exit(3)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Average what comes."""
    strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=1)
    initial = ArrayRecord(training.initial_weights(seed=0))
    result = strategy.start(grid, initial, num_rounds=ROUNDS, evaluate_fn=_evaluate)
    context.state["last"] = result.evaluate_metrics_serverapp[ROUNDS]


def _evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    loss, _, metrics = training.test(arrays.to_numpy_ndarrays(), {}, data=DataSpec())
    return MetricRecord({"loss": loss, **metrics})


def run(probability: float) -> tuple[float, Counter[str]]:
    """Return the last accuracy, and how many messages ended with which error."""
    done = simulate(
        "rounds:server", "rounds:client", num_nodes=NODES, seed=0,
        run_config={"probability": probability, "executor-backend": "standby"},
    )  # fmt: skip
    errors = Counter((task.error or "").partition(":")[0] for task in done.tasks if task.error)
    return float(done.context.state["last"]["accuracy"]), errors


if __name__ == "__main__":
    clean, none = run(0.0)
    faulty, errors = run(PROBABILITY)
    print(f"{ROUNDS} rounds of {NODES} clients: accuracy {clean:.3f}, {none.total()} failures")
    print(f"each fails with probability {PROBABILITY}: accuracy {faulty:.3f}, {errors.total()} failures")
    print(f"    {dict(errors)}")
    sys.exit(0 if none.total() == 0 and errors.total() and abs(clean - faulty) <= POINTS else 1)
