"""Run every federated-learning client in its own process: one Executor, interchangeable backends."""

from fedexec._system.lazy_names import importer

TYPE_CHECKING = False  # type checkers know this name; importing it from typing would take long
if TYPE_CHECKING:
    from fedexec._registry import BackendInfo, backends
    from fedexec._scheduling.futures import Future, Stats
    from fedexec.create import create_executor
    from fedexec.errors import (
        BackendUnavailableError,
        DeviceError,
        FedexecError,
        InitializerError,
        NodeLostError,
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
    from fedexec.executor import Executor
    from fedexec.interface import Backend, Capability, Hooks, Outcome, Task, once
    from fedexec.settings import Settings
    from fedexec.usage import Node, Usage

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
    "Node",
    "NodeLostError",
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

# Names are imported when they are used, so that the command line can be interrupted before numpy is loaded.
__getattr__ = importer(
    __name__,
    {
        "_registry": ("BackendInfo", "backends"),
        "_scheduling.futures": ("Future", "Stats"),
        "errors": (
            "BackendUnavailableError",
            "DeviceError",
            "FedexecError",
            "InitializerError",
            "NodeLostError",
            "PreloadError",
            "SettingsError",
            "TaskTimeoutError",
            "TransferError",
            "UnknownBackendError",
            "UnpickleError",
            "WorkerDiedError",
            "WorkerError",
            "WorkerMemoryError",
        ),
        "create": ("create_executor",),
        "executor": ("Executor",),
        "interface": ("Backend", "Capability", "Hooks", "Outcome", "Task", "once"),
        "settings": ("Settings",),
        "usage": ("Node", "Usage"),
    },
    (
        "backend",
        "cluster",
        "devices",
        "errors",
        "executor",
        "flower",
        "interface",
        "memory",
        "settings",
        "testing",
    ),
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
