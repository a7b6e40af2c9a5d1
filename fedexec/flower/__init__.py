"""Flower over an Executor, in three ways that share the executor and the record of what happened.

:func:`offload` isolates one function of an app, no matter how the app is run. :func:`simulate` runs a whole
``ServerApp``/``ClientApp`` pair. :mod:`fedexec.flower.grpc` follows the tutorial (gRPC, NumPyClient): the
process that hosts the clients or the server stays small and never imports torch.

The names below are imported when they are first used.
"""

import os
from typing import TYPE_CHECKING

from fedexec._system.lazy_names import importer

# Set these before flwr is imported anywhere, so that it sends no telemetry and looks up no newer release.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

if TYPE_CHECKING:
    from fedexec.flower.flower_internals import LoadClientAppError, LoadServerAppError
    from fedexec.flower.history import Round, TaskRecord
    from fedexec.flower.offloading import app_settings, offload
    from fedexec.flower.simulation.app_directory import AppDirectoryError, FlowerApp, installed_app, read_app
    from fedexec.flower.simulation.grid import ExecutorGrid
    from fedexec.flower.simulation.nodes import NodeConfigError
    from fedexec.flower.simulation.run_recorder import RunRecorder
    from fedexec.flower.simulation.simulate import Simulation, app_executor, simulate
    from fedexec.flower.simulation.strategy_hooks import TooFewNodesError
    from fedexec.flower.task_recorder import TaskRecorder

__all__ = [
    "AppDirectoryError",
    "ExecutorGrid",
    "FlowerApp",
    "LoadClientAppError",
    "LoadServerAppError",
    "NodeConfigError",
    "Round",
    "RunRecorder",
    "Simulation",
    "TaskRecord",
    "TaskRecorder",
    "TooFewNodesError",
    "app_executor",
    "app_settings",
    "installed_app",
    "offload",
    "read_app",
    "simulate",
]

__getattr__ = importer(
    __name__,
    {
        "flower_internals": ("LoadClientAppError", "LoadServerAppError"),
        "history": ("Round", "TaskRecord"),
        "offloading": ("app_settings", "offload"),
        "simulation.run_recorder": ("RunRecorder",),
        "simulation.app_directory": ("AppDirectoryError", "FlowerApp", "installed_app", "read_app"),
        "simulation.grid": ("ExecutorGrid",),
        "simulation.nodes": ("NodeConfigError",),
        "simulation.simulate": ("Simulation", "app_executor", "simulate"),
        "simulation.strategy_hooks": ("TooFewNodesError",),
        "task_recorder": ("TaskRecorder",),
    },
)
