"""The tutorial's way: NumPyClient over gRPC, with Flower's deprecated ``start_client`` and server.

The names below are imported when they are first used.
"""

from typing import TYPE_CHECKING

from fedexec._system.lazy_names import importer

if TYPE_CHECKING:
    from fedexec.flower.grpc.address import AddressError, split_address
    from fedexec.flower.grpc.client import ExecutorClient
    from fedexec.flower.grpc.client_auth import RefusedError
    from fedexec.flower.grpc.client_host import ClientHost, ServerUnreachableError
    from fedexec.flower.grpc.result_checks import RoundFailedError
    from fedexec.flower.grpc.server import executor_evaluate_fn, serve
    from fedexec.flower.grpc.strategy import FedAvgMp

__all__ = [
    "AddressError",
    "ClientHost",
    "ExecutorClient",
    "FedAvgMp",
    "RefusedError",
    "RoundFailedError",
    "ServerUnreachableError",
    "executor_evaluate_fn",
    "serve",
    "split_address",
]

__getattr__ = importer(
    __name__,
    {
        "address": ("AddressError", "split_address"),
        "client": ("ExecutorClient",),
        "client_auth": ("RefusedError",),
        "client_host": ("ClientHost", "ServerUnreachableError"),
        "result_checks": ("RoundFailedError",),
        "server": ("executor_evaluate_fn", "serve"),
        "strategy": ("FedAvgMp",),
    },
)
