"""A grid's nodes: the state that each node has left, its waiting messages, and its node_config."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedexec.errors import FedexecError, SettingsError
from fedexec.executor import Executor
from fedexec.flower.flower_internals import NUM_PARTITIONS_KEY, PARTITION_ID_KEY
from fedexec.flower.simulation.pending_message import PendingMessage

__all__ = [
    "Node",
    "NodeConfig",
    "NodeConfigError",
    "NodeResources",
    "Resources",
    "config_of",
    "longest_first",
]

NodeConfig = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]


NodeResources = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]


class NodeConfigError(FedexecError, ValueError):
    """A node_config cannot be sent by Flower; the message names the node."""


@dataclass(slots=True)
class Node:
    """What is known of a node that has had a message.

    Attributes
    ----------
    state : bytes
        The packed state; empty if there is none.
    messages : int
        Number of messages that were sent to the node.
    waiting : deque of PendingMessage
        Messages that wait until the node is free.
    busy : bool
        Whether a message runs, because the messages of a node run one after the other.
    seconds : dict
        How long the last message of each type took.
    """

    state: bytes = b""
    messages: int = 0
    waiting: deque[PendingMessage] = field(default_factory=deque)
    busy: bool = False
    seconds: dict[str, float] = field(default_factory=dict)


class Resources:
    """What each node's messages need, and the executor that heeds it.

    Parameters
    ----------
    executor : Executor
    needs : mapping, or callable ``(partition_id) -> mapping``
    num_nodes : int

    Raises
    ------
    SettingsError
        A node needs what this machine does not have; the message names its partition.
    """

    def __init__(self, executor: Executor, needs: NodeResources, num_nodes: int) -> None:
        self._executor, self._needs = executor, needs
        for partition in range(num_nodes if callable(needs) else 1):
            try:
                self.executor_for(partition)
            except (SettingsError, TypeError) as exc:
                whose = f"partition {partition}" if callable(needs) else "every node"
                raise SettingsError(f"node_resources of {whose}: {exc}") from exc

    def executor_for(self, partition: int) -> Executor:
        """Return the executor for the messages of a node.

        Parameters
        ----------
        partition : int

        Returns
        -------
        Executor
        """
        needs = self._needs(partition) if callable(self._needs) else self._needs
        unknown = set(needs) - {"memory", "device_memory", "threads"}
        if unknown:
            raise SettingsError(f"{sorted(unknown)[0]!r} is none of memory, device_memory and threads")
        return self._executor.with_options(tag=f"partition {partition}", **needs)


def longest_first(
    pending_messages: Sequence[PendingMessage], nodes: Mapping[int, Node]
) -> list[PendingMessage]:
    """Return messages in the order in which they should begin: what takes longest must not begin last.

    Parameters
    ----------
    pending_messages : sequence of PendingMessage
    nodes : mapping of int to Node
        The nodes that have had a message, by their ids.

    Returns
    -------
    list of PendingMessage
        By the time that each node's last message of the type took; nodes without one count as the mean of the
        others. Equal ones keep their order.
    """
    known = {
        pending.id: nodes[pending.node_id].seconds[pending.kind]
        for pending in pending_messages
        if pending.node_id in nodes and pending.kind in nodes[pending.node_id].seconds
    }
    mean = sum(known.values()) / len(known) if known else 0.0
    return sorted(pending_messages, key=lambda pending: known.get(pending.id, mean), reverse=True)


def config_of(node_config: NodeConfig, partition: int, num_nodes: int) -> dict[str, Any]:
    """Return what a node finds in ``context.node_config``.

    Parameters
    ----------
    node_config : mapping, or callable ``(partition_id) -> mapping``
        What the user adds to the number of the partition and the number of partitions.
    partition : int
    num_nodes : int

    Returns
    -------
    dict

    Raises
    ------
    NodeConfigError
        Flower cannot send a value.
    """
    given = node_config(partition) if callable(node_config) else node_config
    for key, value in dict(given).items():
        if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
            raise NodeConfigError(
                f"The node_config of partition {partition} has {key!r}: {value!r}; "
                "Flower can send only str, int, float and bool, under keys that are str."
            )
    return {PARTITION_ID_KEY: partition, NUM_PARTITIONS_KEY: num_nodes, **given}
