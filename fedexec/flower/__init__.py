"""Flower over an Executor, in three ways that share nothing but the executor.

:func:`offload` isolates one function of an app, wherever that runs. :func:`simulate` runs a whole
``ServerApp``/``ClientApp`` pair. :class:`ExecutorClient` and :func:`serve` are the tutorial's way (gRPC,
NumPyClient), whose process hosts clients and the server, stays light and never imports torch.

What is named here is imported when it is used: the tutorial's way alone would cost each worker a second.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Before flwr is imported anywhere: no telemetry, no look-up of newer releases.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

if TYPE_CHECKING:
    from fedexec.flower._private import LoadClientAppError, LoadServerAppError
    from fedexec.flower.address import AddressError, split_address
    from fedexec.flower.appdir import AppDirectoryError, FlowerApp, read_app
    from fedexec.flower.client import ExecutorClient, TaskLog
    from fedexec.flower.grid import ExecutorGrid, NodeConfigError
    from fedexec.flower.history import Round, TaskRecord
    from fedexec.flower.host import ClientHost, ServerUnreachableError
    from fedexec.flower.journal import Journal
    from fedexec.flower.observe import TooFewNodesError
    from fedexec.flower.offloading import app_settings, offload
    from fedexec.flower.proof import RefusedError
    from fedexec.flower.rounds import RoundFailedError
    from fedexec.flower.server import executor_evaluate_fn, serve
    from fedexec.flower.simulation import Simulation, app_executor, simulate
    from fedexec.flower.strategy import FedAvgMp

__all__ = [
    "AddressError",
    "AppDirectoryError",
    "ClientHost",
    "ExecutorClient",
    "ExecutorGrid",
    "FedAvgMp",
    "FlowerApp",
    "Journal",
    "LoadClientAppError",
    "LoadServerAppError",
    "NodeConfigError",
    "RefusedError",
    "Round",
    "RoundFailedError",
    "ServerUnreachableError",
    "Simulation",
    "TaskLog",
    "TaskRecord",
    "TooFewNodesError",
    "app_executor",
    "app_settings",
    "executor_evaluate_fn",
    "offload",
    "read_app",
    "serve",
    "simulate",
    "split_address",
]

_HOMES = {
    "_private": (
        "LoadClientAppError",
        "LoadServerAppError",
    ),
    "address": (
        "AddressError",
        "split_address",
    ),
    "appdir": (
        "AppDirectoryError",
        "FlowerApp",
        "read_app",
    ),
    "client": (
        "ExecutorClient",
        "TaskLog",
    ),
    "grid": (
        "ExecutorGrid",
        "NodeConfigError",
    ),
    "history": (
        "Round",
        "TaskRecord",
    ),
    "host": (
        "ClientHost",
        "ServerUnreachableError",
    ),
    "journal": ("Journal",),
    "observe": ("TooFewNodesError",),
    "offloading": (
        "app_settings",
        "offload",
    ),
    "server": (
        "executor_evaluate_fn",
        "serve",
    ),
    "simulation": (
        "Simulation",
        "app_executor",
        "simulate",
    ),
    "proof": ("RefusedError",),
    "rounds": ("RoundFailedError",),
    "strategy": ("FedAvgMp",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
