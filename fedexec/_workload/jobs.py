"""The job's functions as the host process names them: torch is imported in the worker that runs one."""

from typing import Any

import numpy.typing as npt

from fedexec._workload.data import DataSpec, load_data

__all__ = ["PRELOAD", "prepare", "start_device", "test", "train", "warm_up"]

PRELOAD = ("fedexec._workload.training",)
"""What a worker had better have imported before its first task."""

Weights = list[npt.NDArray[Any]]
Config = dict[str, Any]


def warm_up(data: DataSpec, batch_size: int = 32) -> None:
    """Do once, where workers are forked from, what each would do again: read the data, take a step or two."""
    from fedexec._workload import training

    training.warm_up(data, batch_size)


def prepare(data: DataSpec) -> Weights:
    """Check that the data can be loaded and split, and return the initial weights for its seed."""
    from fedexec._workload import training

    load_data(data)
    load_data(data, client=0)
    return training.initial_weights(data.seed)


def start_device() -> None:
    """Make a context on the GPU, with next to nothing in it."""
    import torch

    torch.zeros(1, device="cuda")


def train(parameters: Weights, config: Config, *, data: DataSpec, client: int) -> tuple[Weights, int, Config]:
    """See :func:`fedexec._workload.training.train`."""
    from fedexec._workload import training

    return training.train(parameters, config, data=data, client=client)


def test(
    parameters: Weights, config: Config, *, data: DataSpec, client: int | None = None
) -> tuple[float, int, Config]:
    """See :func:`fedexec._workload.training.test`."""
    from fedexec._workload import training

    return training.test(parameters, config, data=data, client=client)
