"""The tutorial's way, as written but for today's names: what its processes import, how it calls them."""

import multiprocessing as mp
from collections import OrderedDict  # noqa: F401
from collections.abc import Callable
from typing import Any

import torch  # noqa: F401
import torch.nn as nn  # noqa: F401
import torch.nn.functional as F  # noqa: F401, N812
import torchvision.transforms as transforms  # noqa: F401
from flwr.server.strategy import FedAvg  # noqa: F401
from torch.utils.data import DataLoader  # noqa: F401
from torchvision.datasets import CIFAR10  # noqa: F401


def _in_child(fn: Callable[..., Any], args: tuple[Any, ...], return_dict: Any) -> None:
    return_dict["result"] = fn(*args)


def call(fn: Callable[..., Any], *args: Any) -> Any:
    """Run one function as the tutorial's ``fit`` does: a Manager and a spawned process for each call."""
    context = mp.get_context("spawn")
    manager = context.Manager()
    return_dict = manager.dict()
    p = context.Process(target=_in_child, args=(fn, args, return_dict))
    p.start()
    p.join()
    p.close()
    result = return_dict["result"]
    del (manager, return_dict, p)
    return result
