"""The tutorial's network, and the work of clients and server with it; runs in a worker.

Nothing here reads torch's global random state, so every backend computes the same bits from the same seed,
even ``inline``, whose tasks share a process.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch._dynamo  # The first optimizer step imports these 893 modules; here the template imports them.
import torch.nn.functional as F  # noqa: N812
from torch import nn

from fedexec._workload.data import DataSpec, load_data
from fedexec.devices.device import hidden
from fedexec.devices.emulated.charging import computing

__all__ = ["Net", "get_weights", "initial_weights", "set_weights", "test", "train", "warm_up"]

Weights = list[npt.NDArray[Any]]
Config = dict[str, Any]


class Net(nn.Module):
    """The CNN of "PyTorch: A 60 Minute Blitz": 62,006 parameters, for images of shape (3, 32, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the classes' logits.

        Parameters
        ----------
        x : Tensor of float32, shape (n, 3, 32, 32)

        Returns
        -------
        Tensor of float32, shape (n, 10)
        """
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.flatten(1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        logits: torch.Tensor = self.fc3(x)
        return logits


def get_weights(model: nn.Module) -> Weights:
    """Return a model's parameters and buffers on the CPU, in the order of its state dict.

    Parameters
    ----------
    model : nn.Module

    Returns
    -------
    list of ndarray
    """
    return [value.cpu().numpy() for value in model.state_dict().values()]


def set_weights(model: nn.Module, weights: Weights) -> None:
    """Load weights that :func:`get_weights` returned.

    Parameters
    ----------
    model : nn.Module
    weights : list of ndarray

    Raises
    ------
    RuntimeError
        Their number or shapes do not fit the model.
    """
    keys = model.state_dict().keys()
    if len(keys) != len(weights):
        raise RuntimeError(f"the model has {len(keys)} arrays, but got {len(weights)}")
    state = {key: torch.from_numpy(np.array(value)) for key, value in zip(keys, weights, strict=True)}
    model.load_state_dict(state, strict=True)


def initial_weights(seed: int) -> Weights:
    """Return the weights of a new model; the same seed gives the same weights.

    Parameters
    ----------
    seed : int

    Returns
    -------
    list of ndarray
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_weights(Net())


@hidden()
def warm_up(data: DataSpec, batch_size: int = 32) -> None:
    """Read the data set into this process, and take two training steps of client 0 on the CPU.

    The steps have the batch sizes of a client, whose last batch may be smaller, because oneDNN makes a kernel
    for each size.

    Parameters
    ----------
    data : DataSpec
    batch_size : int
    """
    load_data(data)
    samples = load_data(data, client=0)
    batches = slice(0, batch_size + len(samples.labels) % batch_size)
    with torch.random.fork_rng(devices=[]):
        net = Net()
    config = {"epochs": 1, "batch_size": batch_size, "learning_rate": 0.1}
    images, labels = torch.from_numpy(samples.images[batches]), torch.from_numpy(samples.labels[batches])
    _train(net, config, images, labels, torch.Generator())


def train(parameters: Weights, config: Config, *, data: DataSpec, client: int) -> tuple[Weights, int, Config]:
    """Train the network on one client's samples.

    Parameters
    ----------
    parameters : list of ndarray
        The global weights.
    config : dict
        ``epochs`` (int), ``batch_size`` (int), ``learning_rate`` (float), ``server_round`` (int).
    data : DataSpec
    client : int
        The client whose samples are used.

    Returns
    -------
    tuple of (list of ndarray, int, dict)
        New weights, number of samples, and the mean ``loss`` of the last epoch.
    """
    samples = load_data(data, client=client)
    with computing() as (device, put):
        net = Net()
        set_weights(net, parameters)
        net.to(device)
        images, labels = put(samples.images), put(samples.labels)
        shuffle = torch.Generator().manual_seed(_seed(data.seed, client, int(config["server_round"])))
        loss = _train(net, config, images, labels, shuffle)
        return get_weights(net), len(labels), {"loss": loss}


def _train(
    net: Net, config: Config, images: torch.Tensor, labels: torch.Tensor, shuffle: torch.Generator
) -> float:
    """Take the training steps; return the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=float(config["learning_rate"]), momentum=0.9)
    loss_sum = 0.0
    for _ in range(int(config["epochs"])):
        loss_sum = 0.0
        order = torch.randperm(len(labels), generator=shuffle).to(images.device)
        for batch in torch.split(order, int(config["batch_size"])):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images[batch]), labels[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            loss_sum += loss.item() * len(batch)
    return loss_sum / len(labels)


def test(
    parameters: Weights, config: Config, *, data: DataSpec, client: int | None = None
) -> tuple[float, int, Config]:
    """Evaluate the network on the test set, or on one client's samples.

    Parameters
    ----------
    parameters : list of ndarray
    config : dict
        ``batch_size`` (int, default 256).
    data : DataSpec
    client : int, optional
        None: the test set.

    Returns
    -------
    tuple of (float, int, dict)
        Mean cross-entropy, number of samples, and ``accuracy`` (0 to 1).
    """
    samples = load_data(data, client=client)
    size = int(config.get("batch_size", 256))
    loss_sum, correct = 0.0, 0
    with computing() as (device, put), torch.inference_mode():
        net = Net()
        set_weights(net, parameters)
        net.to(device)
        for start in range(0, len(samples.labels), size):
            batch = slice(start, start + size)
            images, labels = put(samples.images[batch]), put(samples.labels[batch])
            logits = net(images)
            loss_sum += F.cross_entropy(logits, labels, reduction="sum").item()
            correct += int((logits.argmax(1) == labels).sum().item())
    total = len(samples.labels)
    return loss_sum / total, total, {"accuracy": correct / total}


def _seed(*parts: int) -> int:
    """Mix numbers into one seed, so that every client and round shuffles differently."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
