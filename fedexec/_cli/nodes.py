"""``fedexec nodes``: the machines of a cluster on which tasks would run."""

import argparse
import json
from collections.abc import Iterable

from fedexec import _registry
from fedexec._cli import options
from fedexec._system.control_characters import visible
from fedexec._system.sizes import format_size
from fedexec.errors import SettingsError
from fedexec.executor import Executor
from fedexec.interface import Capability, Node
from fedexec.settings import Settings

__all__ = ["command", "describe", "nodes_of"]


def command(arguments: argparse.Namespace) -> int:
    """Print every node of the cluster that the settings name."""
    settings = options.executor_settings(arguments)
    if Capability.REMOTE not in _registry.load_chosen(settings).capabilities:
        raise SettingsError(
            f"backend {settings.backend!r} ({settings.given_by('backend')}) runs tasks on this machine only; "
            "take --backend ray or --backend dask"
        )
    nodes = nodes_of(settings)
    if arguments.json:
        print(json.dumps([node.as_dict() for node in nodes], indent=2))
        return 0
    for node in nodes:
        for line in describe(node):
            print(visible(line))
    total = sum(node.slots for node in nodes)
    print(f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}, {total} tasks at once")
    return 0


def nodes_of(settings: Settings) -> tuple[Node, ...]:
    """Start an executor on a cluster, and return the nodes that it has.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    tuple of Node
    """
    with Executor(settings) as executor:
        return executor.nodes()


def describe(node: Node) -> Iterable[str]:
    """Describe a node in a few lines.

    Parameters
    ----------
    node : Node

    Yields
    ------
    str
    """
    yield node.name
    yield f"  {node.slots} tasks at once, {node.cores} cores, {format_size(node.memory_bytes)} of memory"
    yield f"  devices: {', '.join(node.devices) or 'none'}"
    yield "  " + ", ".join(f"{name} {version}" for name, version in node.versions.items())
    if node.missing:
        yield f"  does not have {', '.join(node.missing)}"
