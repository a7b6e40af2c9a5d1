"""The tutorial's CNN for `simulation.py`; like most apps, both parts import torch."""

import json
import os
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from simulation_apps import serve, settings

from fedexec._workload import training
from fedexec._workload.data import DataSpec
from fedexec.flower.offloading import warm_torch

TRAINING = {"epochs": 5, "batch_size": 32, "learning_rate": 0.02}

client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    spec = DataSpec(clients=int(context.node_config["num-partitions"]))
    config = TRAINING | {"server_round": message.content["config"]["server-round"]}
    weights, examples, metrics = training.train(
        message.content.array_records["arrays"].to_numpy_ndarrays(), config,
        data=spec, client=int(context.node_config["partition-id"]),
    )  # fmt: skip
    record = MetricRecord({**metrics, "num-examples": examples})
    return Message(RecordDict({"arrays": ArrayRecord(weights), "metrics": record}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    serve(grid, training.initial_weights(seed=0), evaluate)


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    loss, _, metrics = training.test(arrays.to_numpy_ndarrays(), {}, data=DataSpec())
    return MetricRecord({"loss": loss, **metrics})


def fork_for_each_fit() -> None:
    """Do only a run's fits and evaluations: one fork per fit, two at a time."""
    run = settings()
    torch.set_num_threads(1)
    warm_torch()
    weights, begun, alive = training.initial_weights(seed=0), time.perf_counter(), 0
    for server_round in range(run["rounds"] + 1):
        for node in range(int(run["nodes"] * run["fraction"]) if server_round else 0):
            if alive == 2:
                os.wait()
                alive -= 1
            if os.fork() == 0:
                config = TRAINING | {"server_round": server_round}
                training.train(weights, config, data=DataSpec(clients=run["nodes"]), client=node)
                os._exit(0)
            alive += 1
        for _ in range(alive):
            os.wait()
        alive = 0
        training.test(weights, {}, data=DataSpec())
    report = {"rounds": time.perf_counter() - begun, "accuracy": None}
    Path(run["report"]).write_text(json.dumps(report))
