"""What a cluster backend asks of an engine: places, agents on them, and calls."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from fedexec._channel.pickling import Blob
from fedexec.settings import Settings

__all__ = ["Agent", "Blob", "Engine", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """A machine of the engine on which a node agent can run.

    Attributes
    ----------
    id : str
        What the engine calls the machine. A machine that has restarted has another id.
    host : str
        Name or address of the machine.
    cores : int or None
        How many cores the engine lends; None for all that the node agent may use.
    """

    id: str
    host: str
    cores: int | None = None


class Agent(ABC):
    """The caller's handle of a :class:`~fedexec.cluster.NodeAgent`."""

    @abstractmethod
    def call(self, method: str, *args: Any) -> "Future[Any]":
        """Call a method of the node agent, without waiting for it.

        Parameters
        ----------
        method : str
        args
            What :meth:`Engine.put` has returned arrives as the blob that was put.

        Returns
        -------
        Future
            Has a ConnectionError if the node agent is gone or cannot be reached. Its callbacks call no method
            of the engine.
        """

    @abstractmethod
    def discard(self) -> None:
        """End the node agent. This does not wait, and does nothing if the node agent is gone."""


class Engine(ABC):
    """An engine of several machines.

    Parameters
    ----------
    settings : Settings

    Attributes
    ----------
    shipping : str
        How the caller's modules get to nodes that do not have its directories: a sentence for an error.
    """

    shipping: str = "Install the module on all nodes, or put it into a directory that they share."

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def connect(self) -> None:
        """Connect to the cluster, or start one.

        Raises
        ------
        BackendUnavailableError
            There is no cluster at the address, or it does not let this process in.
        """

    @abstractmethod
    def places(self) -> Sequence[Place]:
        """Return the machines that the engine knows and believes to be alive.

        Raises
        ------
        ConnectionError
            The engine does not answer.
        """

    @abstractmethod
    def create_agent(self, place: Place) -> Agent:
        """Create a node agent, and wait until it exists.

        A node agent needs a process of its own: :class:`~fedexec.cluster.AgentProcess` has one, so it can be
        created in a process that runs other work.

        Parameters
        ----------
        place : Place

        Returns
        -------
        Agent

        Raises
        ------
        ConnectionError
            The place has no room for it, or cannot import fedexec; the message says which and what to do.
        """

    def put(self, blob: Blob) -> Any:
        """Give bytes to the engine, so that it can bring them to several node agents.

        Parameters
        ----------
        blob : Blob
            Nobody writes to it.

        Returns
        -------
        object
            An argument for :meth:`Agent.call`, which arrives as a Blob. The engine may free the bytes when
            this object is no longer referred to.
        """
        return blob

    @abstractmethod
    def disconnect(self) -> None:
        """Leave the cluster, and end it if :meth:`connect` has started it."""
