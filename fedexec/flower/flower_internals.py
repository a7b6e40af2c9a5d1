"""All names of Flower that are not public; no other file of fedexec uses such a name.

They exist at these places in flwr 1.38 to 1.42. ``tests/flower/test_flower_internals.py`` reports the names
that a newer release has moved.
"""

import os
import uuid
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, Message, Metadata, RecordDict
from flwr.clientapp.client_app import LoadClientAppError
from flwr.common.config import flatten_dict, fuse_dicts, get_project_config, parse_config_args
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.proto.transport_pb2_grpc import add_FlowerServiceServicer_to_server
from flwr.server.superlink.fleet.grpc_bidi.flower_service_servicer import FlowerServiceServicer
from flwr.server.superlink.fleet.grpc_bidi.grpc_bridge import GrpcBridge, GrpcBridgeClosed, InsWrapper
from flwr.server.workflow import DefaultWorkflow
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp import ServerApp
from flwr.serverapp.server_app import LoadServerAppError
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = [
    "NUM_PARTITIONS_KEY",
    "PARTITION_ID_KEY",
    "SUPERLINK_NODE_ID",
    "DefaultWorkflow",
    "ErrorCode",
    "FlowerServiceServicer",
    "GrpcBridge",
    "GrpcBridgeClosed",
    "InsWrapper",
    "LoadClientAppError",
    "LoadServerAppError",
    "Run",
    "add_FlowerServiceServicer_to_server",
    "arrived",
    "become_server",
    "empty_run",
    "flatten_dict",
    "fuse_dicts",
    "get_project_config",
    "has_main",
    "is_file_of_flower",
    "parse_config_args",
    "ray_backend",
    "stamp",
    "workflow_arrays",
]

_FOLDER = str(Path(str(import_module("flwr").__file__)).parent) + os.sep


def become_server(run_id: int) -> None:
    """Let this process make messages, because ``Message(...)`` raises in a process without an identity.

    Parameters
    ----------
    run_id : int
    """
    TaskIdentity.task_id = 1
    TaskIdentity.run_id = run_id
    TaskIdentity.node_id = SUPERLINK_NODE_ID


def empty_run(run_id: int) -> Run:
    """Return what a grid reports as its run.

    Parameters
    ----------
    run_id : int

    Returns
    -------
    Run
    """
    return Run.create_empty(run_id=run_id)


def stamp(message: Message) -> str:
    """Give a message its id, as a SuperLink would.

    Parameters
    ----------
    message : Message

    Returns
    -------
    str
        The id.
    """
    identifier = uuid.uuid4().hex
    message.metadata.__dict__["_message_id"] = identifier
    return identifier


def arrived(content: RecordDict, metadata: Metadata) -> Message:
    """Return a message as its receiver gets it.

    Parameters
    ----------
    content : RecordDict
    metadata : Metadata

    Returns
    -------
    Message
    """
    return Message(content=content, metadata=metadata)  # type: ignore[call-overload,no-any-return]


def has_main(app: ServerApp) -> bool:
    """Return whether a ServerApp has anything to run: a main, or an older app's server_fn or strategy.

    Parameters
    ----------
    app : ServerApp

    Returns
    -------
    bool
    """
    return any(
        getattr(app, name, None) for name in ("_main", "_server_fn", "_server", "_strategy", "_config")
    )


def is_file_of_flower(path: str) -> bool:
    """Return whether a file of source code is Flower's own.

    Parameters
    ----------
    path : str

    Returns
    -------
    bool
    """
    return path.startswith(_FOLDER)


def workflow_arrays(context: Context) -> ArrayRecord | None:
    """Return the global model that a DefaultWorkflow leaves.

    Parameters
    ----------
    context : Context

    Returns
    -------
    ArrayRecord or None
        None if there is no model.
    """
    return context.state.array_records.get(MAIN_PARAMS_RECORD)


def ray_backend(config: dict[str, Any]) -> Any:
    """Start the backend of Flower's own simulation engine; needs Ray.

    Parameters
    ----------
    config : dict
        The backend's configuration.

    Returns
    -------
    flwr's RayBackend
    """
    return import_module("flwr.server.superlink.fleet.vce.backend.raybackend").RayBackend(config)
