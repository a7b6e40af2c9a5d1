"""ClientApps and ServerApps of these tests: numpy only, so that a worker starts in milliseconds."""

import os
import signal
import time

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedexec.flower import offload
from fedexec.testing.bad_tasks import end_child


def weights(message: Message) -> list[np.ndarray]:
    return next(iter(message.content.array_records.values())).to_numpy_ndarrays()


def reply(message, arrays, **metrics):
    metrics.setdefault("num-examples", 1)
    content = RecordDict({"metrics": MetricRecord(metrics)})
    if arrays is not None:
        content["arrays"] = ArrayRecord(arrays)
    return Message(content, reply_to=message)


def visits(context: Context) -> int:
    """Count the visits of this node, in its state."""
    before = context.state["visits"]["count"] if "visits" in context.state else 0
    assert isinstance(before, int)
    context.state["visits"] = MetricRecord({"count": before + 1})
    return before + 1


# ---------------------------------------------------------------- the usual

client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Move the weights by an amount that depends on who and when."""
    partition = int(context.node_config["partition-id"])
    server_round = message.content["config"]["server-round"]
    assert isinstance(server_round, int)
    moved = [np.float32(0.9) * array + np.float32(partition + server_round) for array in weights(message)]
    return reply(
        message, moved, **{"num-examples": 10 + partition},
        pid=os.getpid(), partition=partition, visits=visits(context),
    )  # fmt: skip


@client.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return reply(message, None, loss=float(sum(array.sum() for array in weights(message))))


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    strategy = FedAvg(
        fraction_train=float(config.get("fraction", 1.0)),
        fraction_evaluate=float(config.get("fraction-evaluate", 0.0)),
        min_train_nodes=int(config.get("min-nodes", 1)),
        min_available_nodes=int(config.get("min-available", 1)),
        min_evaluate_nodes=0,
    )
    strategy.start(
        grid,
        ArrayRecord([np.zeros((3, 2), np.float32), np.ones(4, np.float32)]),
        num_rounds=int(config.get("num-rounds", 2)),
        timeout=float(config.get("timeout", 3600.0)),
        evaluate_fn=evaluate_globally if config.get("evaluate", False) else None,
    )


def evaluate_globally(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    total = float(sum(array.sum() for array in arrays.to_numpy_ndarrays()))
    return MetricRecord({"loss": total, "accuracy": 0.5, "pid": os.getpid()})


# ---------------------------------------------------------------- those that go wrong

faulty = ClientApp()


@faulty.train()
def faulty_train(message: Message, context: Context) -> Message:
    """Fail in round 1 on the partitions that the run config names."""
    culprits = str(context.run_config["culprits"]).split(",")
    first = message.content["config"]["server-round"] == 1
    if first and str(context.node_config["partition-id"]) in culprits:
        match context.run_config["how"]:
            case "raise":
                raise ValueError("no data today")
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "leave":
                raise SystemExit(4)
            case "hang":
                time.sleep(3600)
            case "rubbish":
                return {"not": "a message"}  # type: ignore[return-value]
            case "echo":
                return message
    return train(message, context)


hanging = ClientApp()


@hanging.train()
def hang(message: Message, context: Context) -> Message:
    os.write(1, b"hanging\n")  # in one go: others write there too
    time.sleep(3600)
    return message


# ---------------------------------------------------------------- with processes of its own


def end_a_fork() -> int | None:
    """Fork a process, and end it as a pool of multiprocessing ends its own; return its exit code."""
    return end_child(sleep)


def sleep(writing):
    writing.send("begun")
    time.sleep(3600)


# ---------------------------------------------------------------- offloaded


@offload
def offloaded_train(message: Message, context: Context) -> Message:
    return reply(message, weights(message), pid=os.getpid(), visits=visits(context), inner=inner_pid())


@offload
def inner_pid() -> int:
    return os.getpid()
