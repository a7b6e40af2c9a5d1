"""What the benchmarks run in workers. Imports nothing at the top, so that a start is not charged with it."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

__all__ = [
    "Stamped",
    "clock",
    "die",
    "fit",
    "fit_numpy",
    "fit_resnet",
    "give_back",
    "initial_numpy",
    "initial_resnet",
    "initial_weights",
    "nothing",
    "prepare",
    "read",
    "stamped",
    "wait",
    "warm_up_cnn",
    "warm_up_resnet",
]

T = TypeVar("T")
Weights = list[Any]

EPOCHS = {"cnn": 25, "cnn-short": 1}  # half a second, and a fiftieth of one


class Stamped(NamedTuple):
    """What a task returned, and when its worker was born, entered it and left it; see :func:`clock`.

    `imports` are the seconds that it has spent meanwhile on imports.
    """

    value: Any
    pid: int
    born: float | None
    entered: float
    left: float
    imports: float

    @property
    def computed(self) -> float:
        """Return the seconds without imports; two clocks may differ by less than nothing."""
        return max(0.0, self.left - self.entered - self.imports)


def clock() -> float:
    """Return seconds since the machine was started: one clock for all its processes, their births too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def stamped(fn: Callable[..., Any], *args: Any) -> Stamped:
    """Run a task and say when."""
    from fedexec._worker.imports import Imports, watch

    watch()  # Nobody else does it in the worker of a peer.
    new = Imports()
    entered = clock()
    value = fn(*args)
    return Stamped(value, os.getpid(), _born(), entered, clock(), new.seconds())


def _born() -> float | None:
    try:
        with open("/proc/self/stat") as file:  # noqa: PTH123 (pathlib is not imported yet)
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def prepare(modules: tuple[str, ...], warmup: Callable[[], object] | None, threads: int) -> None:
    """Do for another's worker what ours are born with: imports, and its share of the cores."""
    from importlib import import_module

    for name in modules:
        import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    if warmup is not None:
        warmup()


def nothing() -> None:
    """Do nothing."""


def give_back(value: T) -> T:
    """Return the argument."""
    return value


def read(arrays: list[Any]) -> float:
    """Read every page of every array."""
    return float(sum(array[::1024].sum() for array in arrays))


def wait(seconds: float, value: T) -> T:
    """Take some time."""
    time.sleep(seconds)
    return value


def die() -> None:
    """End this process as the kernel does when memory is short."""
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def initial_weights() -> Weights:
    """Return the weights that a federation of the tutorial's CNN begins with."""
    from fedexec._workload import training

    return training.initial_weights(0)


def warm_up_cnn() -> None:
    """Read the data, take a step."""
    from fedexec._workload import jobs
    from fedexec._workload.data import DataSpec

    jobs.warm_up(DataSpec())


def fit(workload: str, weights: Weights, client: int) -> tuple[Weights, int]:
    """Train one of ten clients on the digits; return the new weights and the number of samples."""
    from fedexec._workload import jobs
    from fedexec._workload.data import DataSpec

    config = {"epochs": EPOCHS[workload], "batch_size": 32, "learning_rate": 0.02, "server_round": 1}
    data = DataSpec(clients=10)
    return jobs.train(weights, config, data=data, client=client % 10)[:2]


def initial_resnet() -> Weights:
    """Return random weights of a ResNet-18: 11 million parameters, 45 MB."""
    import torch
    from torchvision.models import resnet18

    from fedexec._workload import training

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return training.get_weights(resnet18(num_classes=10))


def warm_up_resnet() -> None:
    """Take a step, on the CPU: where workers are forked from, no device may be touched."""
    import torch

    from fedexec.devices.device import hidden

    with hidden():
        _step_of_resnet(initial_resnet(), 0, torch.device("cpu"), torch.from_numpy)


def fit_resnet(weights: Weights, client: int) -> Weights:
    """Take one step with eight random images."""
    from fedexec.devices.emulated.charging import computing

    with computing() as (device, put):
        return _step_of_resnet(weights, client, device, put)


def _step_of_resnet(weights: Weights, client: int, device: Any, put: Callable[[Any], Any]) -> Weights:
    import torch
    from torchvision.models import resnet18

    from fedexec._workload import training

    model = resnet18(num_classes=10)
    training.set_weights(model, weights)
    model.to(device)
    seeded = torch.Generator().manual_seed(client)
    images = put(torch.rand(8, 3, 64, 64, generator=seeded).numpy())
    labels = put(torch.randint(10, (8,), generator=seeded).numpy())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.nn.functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return training.get_weights(model)


def initial_numpy() -> Weights:
    """Return the weights of a linear model."""
    import numpy as np

    return [np.zeros((64, 10)), np.zeros(10)]


def fit_numpy(weights: Weights, client: int) -> Weights:
    """Take 40 steps of softmax regression on 1,000 samples; no BLAS, whose threads would change bits."""
    import numpy as np

    rng = np.random.default_rng(client)
    samples, labels = rng.standard_normal((1000, 64)), rng.integers(0, 10, 1000)
    matrix, bias = (np.array(array) for array in weights)
    for _ in range(40):
        logits = np.einsum("ns,sc->nc", samples, matrix) + bias
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        shares[np.arange(1000), labels] -= 1
        matrix -= 0.1 / 1000 * np.einsum("ns,nc->sc", samples, shares)
        bias -= 0.1 / 1000 * shares.sum(axis=0)
    return [matrix, bias]
