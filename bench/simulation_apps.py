"""Apps for `simulation.py`, as both engines run them: one that does nothing, one that dies; no torch."""

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
    """What this run is; in the environment, for Flower's own engine has no other way."""
    return json.loads(os.environ["FEDEXEC_BENCH"])


# ---------------------------------------------------------------- nothing, and death

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
        """Aggregate what is no failure."""
        replies = list(replies)
        self.replies.append(len(replies))
        self.failures.append(sum(reply.has_error() for reply in replies))
        return super().aggregate_train(server_round, [reply for reply in replies if reply.has_content()])


@server.main()
def main(grid: Grid, context: Context) -> None:
    serve(grid, [np.zeros(1000, np.float32)])


def serve(grid: Grid, initial: list, evaluate=None) -> None:
    """Run the rounds, and note how long they took, who failed, and the weights."""
    run = settings()
    strategy = Counting(fraction_train=run["fraction"], fraction_evaluate=0.0, min_train_nodes=1)
    begun = time.perf_counter()
    result = strategy.start(
        grid, ArrayRecord(initial), num_rounds=run["rounds"], timeout=run["timeout"], evaluate_fn=evaluate
    )
    last = result.evaluate_metrics_serverapp.get(run["rounds"], {})
    report = {
        "rounds": time.perf_counter() - begun,
        "failures": strategy.failures,
        "replies": strategy.replies,
        "accuracy": last.get("accuracy"),
    }
    Path(run["report"]).write_text(json.dumps(report))
    np.savez(run["report"] + ".npz", *[array.numpy() for array in result.arrays.values()])
