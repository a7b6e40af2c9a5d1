"""What a task has cost, and what a node of a cluster has."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Node", "Usage", "node_name"]

LONGEST_NAME, SHORT_NAME = 40, 12  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What one task has cost. A value that was not measured is None.

    Attributes
    ----------
    worker_pid : int
        Process id of the worker that ran the task.
    wall_seconds, cpu_seconds : float
        Seconds from the first to the last instruction of the task, and CPU time of all threads of the worker
        in that time.
    peak_host_bytes : int or None
        Largest resident set of the worker while the task ran.
    end_host_bytes : int or None
        Resident set of the worker at the end of the task.
    idle_host_bytes : int or None
        Resident set of the worker before its first task.
    device : str or None
        UUID of the device on which the worker computed; "EMULATED-..." if the device is emulated.
    peak_device_bytes, end_device_bytes : int or None
        Most bytes that the worker held on the device while the task ran, and bytes that it held at the end,
        including the context. 0 only if the worker is known to have held nothing.
    peak_allocated_bytes, peak_reserved_bytes : int or None
        Peaks of torch's allocator while the task ran.
    import_seconds : float or None
        Seconds of imports: those that unpickling the call needed, and those of the task itself, which are
        also part of `wall_seconds`.
    unpickle_seconds : float or None
        Seconds that unpickling the call took, including the imports that it needed.
    setup_seconds : float or None
        Seconds that the set-up of the worker (preload, initializer) took before its first task. If workers
        start before there are tasks, no task has to wait for it.
    node : str or None
        Name of the host of the node on which the task ran; None if tasks run on the caller's machine.
    """

    worker_pid: int
    wall_seconds: float
    cpu_seconds: float
    peak_host_bytes: int | None = None
    end_host_bytes: int | None = None
    idle_host_bytes: int | None = None
    device: str | None = None
    peak_device_bytes: int | None = None
    end_device_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    import_seconds: float | None = None
    unpickle_seconds: float | None = None
    setup_seconds: float | None = None
    node: str | None = None

    @property
    def may_hold_device(self) -> bool:
        """Whether the worker may have held device memory at the end of the task; True if that is unknown."""
        if self.end_device_bytes is not None:
            return self.end_device_bytes > 0
        return self.device is not None or self.peak_reserved_bytes is not None

    def as_dict(self) -> dict[str, Any]:
        """Return the usage as a dictionary that :mod:`json` can write."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Node:
    """What a node of a cluster has.

    Attributes
    ----------
    id : str
        What the engine calls the node.
    host : str
        Name of its host.
    slots : int
        How many tasks it runs at once.
    cores : int
        How many cores it may use.
    memory_bytes : int
        How much host memory it may use.
    devices : tuple of str
        Names of its devices.
    versions : mapping of str to str
        Versions of Python and of the packages that the caller and the node should have in common.
    missing : tuple of str
        Directories of the caller's ``sys.path`` that the node does not have, so it finds no module there.
    """

    id: str
    host: str
    slots: int
    cores: int
    memory_bytes: int
    devices: tuple[str, ...]
    versions: Mapping[str, str]
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the node for messages."""
        return node_name(self.host, self.id)

    def as_dict(self) -> dict[str, Any]:
        """Return the description as a dictionary that :mod:`json` can write."""
        return asdict(self)


def node_name(host: str, identifier: str) -> str:
    """Return the name of a node for messages, which differs from that of others on the same host.

    Parameters
    ----------
    host : str
    identifier : str
        What the engine calls the node: an address, or a long number, which is shortened.

    Returns
    -------
    str
        Such as ``"host1 (tcp://10.0.0.2:40123)"``.
    """
    return f"{host} ({identifier if len(identifier) <= LONGEST_NAME else identifier[:SHORT_NAME]})"
