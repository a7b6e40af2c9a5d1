"""What the benchmarks run in workers. Imports nothing at the top, so that a start is not charged with it."""

from typing import Any, TypeVar

T = TypeVar("T")


def nothing() -> None:
    """Do nothing."""


def give_back(value: T) -> T:
    """Return the argument."""
    return value


def read(arrays: list[Any]) -> float:
    """Read every page of every array."""
    return float(sum(array[::1024].sum() for array in arrays))


def import_torch() -> None:
    """Import what the training task needs."""
    from fedexec.workload import training  # noqa: F401


def warm_up(threads: int) -> None:
    """Do for a worker that stays what ours are born with: imports, data, a first step, its share of cores."""
    import torch

    from fedexec.workload import jobs
    from fedexec.workload.data import DataSpec

    torch.set_num_threads(threads)
    jobs.warm_up(DataSpec())


def limit_threads(threads: int) -> None:
    """Import what the training task needs, and hold it to its share of the cores."""
    import_torch()
    import torch

    torch.set_num_threads(threads)


def fit(weights: list[Any], client: int, epochs: int) -> int:
    """Train one of ten clients on the digits; return the number of samples."""
    from fedexec.workload import jobs
    from fedexec.workload.data import DataSpec

    config = {"epochs": epochs, "batch_size": 32, "learning_rate": 0.02, "server_round": 1}
    return jobs.train(weights, config, data=DataSpec(clients=10), client=client)[1]
