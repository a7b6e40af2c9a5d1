"""Run every federated-learning client in its own process: one Executor, interchangeable backends."""

from fedexec._registry import BackendInfo, backends
from fedexec._scheduling.futures import Future, Stats
from fedexec.errors import (
    BackendUnavailableError,
    DeviceError,
    FedexecError,
    InitializerError,
    PreloadError,
    SettingsError,
    TaskTimeoutError,
    TransferError,
    UnknownBackendError,
    UnpickleError,
    WorkerDiedError,
    WorkerError,
    WorkerMemoryError,
)
from fedexec.executor import Executor, create_executor
from fedexec.interface import Backend, Capability, Hooks, Outcome, Task, Usage, once
from fedexec.settings import Settings

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "BackendInfo",
    "BackendUnavailableError",
    "Capability",
    "DeviceError",
    "Executor",
    "FedexecError",
    "Future",
    "Hooks",
    "InitializerError",
    "Outcome",
    "PreloadError",
    "Settings",
    "SettingsError",
    "Stats",
    "Task",
    "TaskTimeoutError",
    "TransferError",
    "UnknownBackendError",
    "UnpickleError",
    "Usage",
    "WorkerDiedError",
    "WorkerError",
    "WorkerMemoryError",
    "backends",
    "create_executor",
    "once",
]
