"""BlazeFL's federated averaging for `simulation.py`: its own trainers, and the same training as a Flower app.

Each client reads its samples, made in CIFAR-10's shape, from a file, as in BlazeFL's examples.
"""

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blazefl.contrib import fedavg
from blazefl.core import IPCMode, ModelSelector, serialize_model
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from simulation_apps import serve, settings
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models import resnet18
from torchvision.transforms import Normalize

BATCH_SIZE, LEARNING_RATE = 50, 0.1
EPOCHS = {"cnn": 5, "resnet18": 1}
AT_ONCE = 2

client, server = ClientApp(), ServerApp()


class Models(ModelSelector):
    """A CNN of 0.25 MB and ResNet-18, of 45 MB."""

    def select_model(self, model_name: str) -> nn.Module:
        """Make a model, the same each time."""
        torch.manual_seed(0)
        if model_name == "resnet18":
            return resnet18(num_classes=10)
        return nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip


class Samples:
    """A client's samples, in a file: BlazeFL's interface of a partitioned data set."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def get_dataset(self, type_: Any, cid: int | None) -> Dataset:
        """Read a client's samples."""
        images, labels = torch.load(Path(self.directory, f"{cid}.pt"))
        normalized = Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))(images.float() / 255)
        return TensorDataset(normalized, labels)

    def set_dataset(self, type_: Any, cid: int | None, dataset: Dataset) -> None:
        """Keep nothing: the file is still there."""

    def get_dataloader(
        self, type_: Any, cid: int | None, batch_size: int | None, generator: torch.Generator | None
    ) -> DataLoader:
        """Return a loader that shuffles a client's samples."""
        return DataLoader(self.get_dataset(type_, cid), batch_size, shuffle=True, generator=generator)


def make_samples(directory: str, clients: int, samples: int) -> None:
    """Write the samples of each client."""
    for cid in range(clients):
        random = torch.Generator().manual_seed(cid)
        images = torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=random)
        labels = torch.randint(0, 10, (samples,), generator=random)
        torch.save((images, labels), Path(directory, f"{cid}.pt"))


@client.train()
def train(message: Message, context: Context) -> Message:
    run, cid = settings(), int(context.node_config["partition-id"])
    (weights,) = message.content.array_records["arrays"].to_numpy_ndarrays()
    generator = torch.Generator().manual_seed(cid)
    package = fedavg.FedAvgProcessPoolClientTrainer.train(
        model=Models().select_model(run["model"]), model_parameters=torch.from_numpy(weights.copy()),
        train_loader=Samples(run["data"]).get_dataloader(None, cid, BATCH_SIZE, generator),
        device="cpu", epochs=EPOCHS[run["model"]], lr=LEARNING_RATE, stop_event=threading.Event(), cid=cid,
    )  # fmt: skip
    arrays = ArrayRecord([package.model_parameters.numpy()])
    metrics = MetricRecord({"num-examples": package.data_size})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    serve(grid, [serialize_model(Models().select_model(settings()["model"])).numpy()])


def run_blazefl(mode: str) -> None:
    """Run BlazeFL's own rounds, with its processes or its threads."""
    run = settings()
    torch.set_num_threads(1)
    data: Any = Samples(run["data"])
    handler = fedavg.FedAvgBaseServerHandler(
        Models(), run["model"], data, run["rounds"], run["nodes"], run["fraction"], "cpu", BATCH_SIZE, 0
    )
    common = (data, "cpu", run["nodes"], EPOCHS[run["model"]], BATCH_SIZE, LEARNING_RATE, 0, AT_ONCE)
    if mode == "threads":
        trainer: Any = fedavg.FedAvgThreadPoolClientTrainer(Models(), run["model"], *common)
    else:
        places = (Path("share").absolute(), Path("state").absolute())
        trainer = fedavg.FedAvgProcessPoolClientTrainer(
            Models(), run["model"], *places, *common, IPCMode.SHARED_MEMORY
        )
    begun = time.perf_counter()
    while not handler.if_stop():
        trainer.local_process(handler.downlink_package(), handler.sample_clients())
        for package in trainer.uplink_package():
            handler.load(package)
    report = {"rounds": time.perf_counter() - begun, "accuracy": None}
    Path(run["report"]).write_text(json.dumps(report))
    np.savez(run["report"] + ".npz", serialize_model(handler.model).numpy())
