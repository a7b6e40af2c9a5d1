"""The tutorial's CNN for `simulation.py`: both apps import torch, as apps do."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from simulation_apps import serve

from fedexec.workload import training
from fedexec.workload.data import DataSpec

TRAINING = {"epochs": 5, "batch_size": 32, "learning_rate": 0.02}

client, server = ClientApp(), ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    spec = DataSpec(clients=context.node_config["num-partitions"])
    config = TRAINING | {"server_round": message.content["config"]["server-round"]}
    weights, examples, metrics = training.train(
        message.content["arrays"].to_numpy_ndarrays(), config,
        data=spec, client=context.node_config["partition-id"],
    )  # fmt: skip
    record = MetricRecord({**metrics, "num-examples": examples})
    return Message(RecordDict({"arrays": ArrayRecord(weights), "metrics": record}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    serve(grid, training.initial_weights(seed=0), evaluate)


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    loss, _, metrics = training.test(arrays.to_numpy_ndarrays(), {}, data=DataSpec())
    return MetricRecord({"loss": loss, **metrics})
