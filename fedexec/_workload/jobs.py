"""The job's functions, as the host process names them; only the worker that runs one imports torch."""

from typing import Any

import numpy.typing as npt

from fedexec._workload.data import DataSpec, load_data

__all__ = ["PRELOAD", "prepare", "start_device", "test", "train", "warm_up"]

PRELOAD = ("fedexec._workload.training",)
"""Modules that a worker should import before its first task."""

Weights = list[npt.NDArray[Any]]
Config = dict[str, Any]


def warm_up(data: DataSpec, batch_size: int = 32) -> None:
    """Read the data and take two training steps in the template, so that no worker has to.

    Parameters
    ----------
    data : DataSpec
    batch_size : int
    """
    from fedexec._workload import training

    training.warm_up(data, batch_size)


def prepare(data: DataSpec) -> Weights:
    """Check that the data can be loaded and split, and make the initial weights for its seed.

    Parameters
    ----------
    data : DataSpec

    Returns
    -------
    list of ndarray
    """
    from fedexec._workload import training

    load_data(data)
    load_data(data, client=0)
    return training.initial_weights(data.seed)


def start_device() -> None:
    """Create a CUDA context and almost nothing in it."""
    import torch

    torch.zeros(1, device="cuda")


def train(parameters: Weights, config: Config, *, data: DataSpec, client: int) -> tuple[Weights, int, Config]:
    """Train on one client's samples; see :func:`fedexec._workload.training.train`.

    Parameters
    ----------
    parameters : list of ndarray
    config : dict
    data : DataSpec
    client : int

    Returns
    -------
    tuple of (list of ndarray, int, dict)
        New weights, number of samples, metrics.
    """
    from fedexec._workload import training

    return training.train(parameters, config, data=data, client=client)


def test(
    parameters: Weights, config: Config, *, data: DataSpec, client: int | None = None
) -> tuple[float, int, Config]:
    """Evaluate the weights; see :func:`fedexec._workload.training.test`.

    Parameters
    ----------
    parameters : list of ndarray
    config : dict
    data : DataSpec
    client : int, optional

    Returns
    -------
    tuple of (float, int, dict)
        Loss, number of samples, metrics.
    """
    from fedexec._workload import training

    return training.test(parameters, config, data=data, client=client)
