"""An app without torch: softmax regression in numpy, on the digits."""

import sys

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedexec._workload.data import DataSpec, load_data

PIXELS, CLASSES = 64, 10


def digits(partition=None, partitions=1):
    """Return images as they were, 8x8 in a row, and their classes."""
    samples = load_data(DataSpec(clients=partitions), client=partition)
    return samples.images[:, 0, 2::4, 2::4].reshape(-1, PIXELS), samples.labels


def mine(context: Context):
    return digits(context.node_config["partition-id"], context.node_config["num-partitions"])


def logits(images, weights, bias):
    return images @ weights + bias


def answer(message, arrays, examples):
    metrics = MetricRecord({"num-examples": examples, "knows_torch": int("torch" in sys.modules)})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics}), reply_to=message)


client = ClientApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Take some steps of gradient descent."""
    weights, bias = message.content.array_records["arrays"].to_numpy_ndarrays()
    images, labels = mine(context)
    wanted = np.eye(CLASSES)[labels]
    for _ in range(50):
        scores = logits(images, weights, bias)
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        error = (odds / odds.sum(axis=1, keepdims=True) - wanted) / len(labels)
        weights, bias = weights - images.T @ error, bias - error.sum(axis=0)
    return answer(message, [weights, bias], len(labels))


server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    images, labels = digits()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        guesses = logits(images, *arrays.to_numpy_ndarrays()).argmax(axis=1)
        return MetricRecord({"accuracy": float((guesses == labels).mean())})

    initial = ArrayRecord([np.zeros((PIXELS, CLASSES)), np.zeros(CLASSES)])
    FedAvg(fraction_evaluate=0.0).start(grid, initial, num_rounds=3, evaluate_fn=evaluate)
