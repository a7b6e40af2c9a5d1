"""Apps for `simulation.py`, for both engines and without torch: one does nothing, one dies."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg


def settings():
    """Return this run's settings, which are in the environment: Flower's engine offers no other way."""
    return json.loads(os.environ["FEDEXEC_BENCH"])


# ---------------------------------------------------------------- clients: one does nothing, one dies

idle = ClientApp()


@idle.train()
def do_nothing(message: Message, context: Context) -> Message:
    content = {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


mortal = ClientApp()


@mortal.train()
def die_in_round_1(message: Message, context: Context) -> Message:
    if context.node_config["partition-id"] == 0 and message.content["config"]["server-round"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return do_nothing(message, context)


# ---------------------------------------------------------------- the server

server = ServerApp()


class Counting(FedAvg):
    """Counts the replies of each round, and the failures among them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.failures, self.replies = [], []

    def aggregate_train(self, server_round, replies):
        """Count the failures, and aggregate the other replies."""
        replies = list(replies)
        self.replies.append(len(replies))
        self.failures.append(sum(reply.has_error() for reply in replies))
        return super().aggregate_train(server_round, [reply for reply in replies if reply.has_content()])


@server.main()
def main(grid: Grid, context: Context) -> None:
    serve(grid, [np.zeros(1000, np.float32)])


def serve(grid: Grid, initial: list, evaluate=None) -> None:
    """Run the rounds, and report how long they took, the failures, and the weights.

    Parameters
    ----------
    grid : Grid
    initial : list of ndarray
        Weights of the initial model.
    evaluate : callable, optional
        The strategy's ``evaluate_fn``.
    """
    run = settings()
    strategy = Counting(fraction_train=run["fraction"], fraction_evaluate=0.0, min_train_nodes=1)
    begun = time.perf_counter()
    result = strategy.start(
        grid, ArrayRecord(initial), num_rounds=run["rounds"], timeout=run["timeout"], evaluate_fn=evaluate
    )
    last = result.evaluate_metrics_serverapp.get(run["rounds"], MetricRecord())
    report = {
        "rounds": time.perf_counter() - begun,
        "failures": strategy.failures,
        "replies": strategy.replies,
        "accuracy": last.get("accuracy"),
    }
    Path(run["report"]).write_text(json.dumps(report))
    np.savez(run["report"] + ".npz", *[array.numpy() for array in result.arrays.values()])
