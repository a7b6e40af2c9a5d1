"""Flower over an Executor: clients whose work runs in workers, the tutorial's way (gRPC, NumPyClient).

The process that imports this hosts clients and the server; it stays light and never imports torch.
"""

import os

# Before flwr is imported anywhere: no telemetry, no look-up of newer releases.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from fedexec.flower.address import AddressError, split_address
from fedexec.flower.client import ExecutorClient, TaskLog, TaskRecord
from fedexec.flower.host import ClientHost, ServerUnreachableError
from fedexec.flower.rounds import Round, RoundFailedError
from fedexec.flower.server import executor_evaluate_fn, serve
from fedexec.flower.strategy import FedAvgMp

__all__ = [
    "AddressError",
    "ClientHost",
    "ExecutorClient",
    "FedAvgMp",
    "Round",
    "RoundFailedError",
    "ServerUnreachableError",
    "TaskLog",
    "TaskRecord",
    "executor_evaluate_fn",
    "serve",
    "split_address",
]
