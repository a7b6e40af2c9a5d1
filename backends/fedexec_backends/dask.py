"""``dask``: tasks run on the hosts of a Dask cluster, each in a process of its own.

One worker of each host gets a node agent, as an actor whose work is done in a process of its own. The threads
and the memory limits of the workers are not used.
"""

import asyncio
import socket
import uuid
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any
from weakref import WeakValueDictionary

import distributed
from distributed import Actor, Client, LocalCluster, Security

from fedexec.backend import BackendUnavailableError, Settings
from fedexec.cluster import Agent, AgentProcess, ClusterBackend, Engine, Place

__all__ = ["DaskBackend"]

LOCAL = "local"
CONNECT_SECONDS = 10.0
CREATE_SECONDS = 30.0
LOOPBACK = "127.0.0.1:0"
REACH_SECONDS = 2.0


_node_agents: "WeakValueDictionary[str, NodeAgentOnWorker]" = WeakValueDictionary()  # in a worker of Dask


class NodeAgentOnWorker(AgentProcess):
    """The node agent, an actor on a worker of Dask.

    Parameters
    ----------
    name : str
        No other node agent has it.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        _node_agents[name] = self


class Leash:
    """Ends a node agent when the client is gone: an actor that Dask then deletes.

    Dask deletes the node agent's own actor too, but a call that runs keeps it alive.

    Parameters
    ----------
    name : str
        Name of the node agent.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __del__(self) -> None:
        if (node_agent := _node_agents.get(self._name)) is not None:
            node_agent.hang_up()


class DaskAgent(Agent):
    """The caller's end of a node agent.

    Parameters
    ----------
    client : Client
    actor : distributed.Actor
    created : list of distributed.Future
        Keep the actor and its leash alive.
    """

    def __init__(self, client: Client, actor: Any, created: list[Any]) -> None:
        self._client, self._actor, self._created = client, actor, created

    def call(self, method: str, *args: Any) -> "Future[Any]":
        """Call a method of the node agent; see :meth:`Agent.call`."""
        return asyncio.run_coroutine_threadsafe(self._call(method, args), self._client.loop.asyncio_loop)

    async def _call(self, method: str, args: tuple[Any, ...]) -> Any:
        try:
            return await getattr(self._actor, method)(*args)
        except (
            OSError,
            RuntimeError,
            KeyError,
        ) as exc:  # of the connection: a node agent itself raises nothing
            raise ConnectionError(f"Dask: {exc}") from exc

    def discard(self) -> None:
        """Have the worker delete the leash and the actor."""
        for future in self._created:
            try:
                future.release()
            except Exception:  # the client is closed, so the scheduler has released it
                return


class DaskEngine(Engine):
    """A Dask cluster: the one at the address, else that of the current client, else one in this process.

    Parameters
    ----------
    settings : Settings
    """

    shipping = (
        "Install the module on all workers, put it into a directory that they share, or send it along: "
        "Client(address).upload_file('module.py') before the executor is made."
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._client: Client | None = None
        self._cluster: LocalCluster | None = None

    @property
    def client(self) -> Client:
        """The client of the cluster."""
        assert self._client is not None
        return self._client

    def connect(self) -> None:
        """Connect to the cluster, or start one in this process."""
        address = self.settings.dask_address
        current = _current_client() if address is None else None
        if current is not None:
            # A client of our own, whose calls need not go through the scheduler, and which is closed with us.
            address, options = current.scheduler.address, {"security": current.security}
            if address.startswith("inproc:"):
                options["loop"] = current.loop
        elif address is None or address == LOCAL:
            self._cluster = LocalCluster(
                n_workers=1,
                threads_per_worker=1,
                processes=False,
                memory_limit=0,
                dashboard_address=LOOPBACK,  # with None it listens to other machines
                worker_dashboard_address=LOOPBACK,
            )
            address, options = self._cluster.scheduler_address, {"loop": self._cluster.loop}
        else:
            options = {}
            _check_address(address)
        try:
            self._client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False, **options)
        except (OSError, ValueError, TypeError) as exc:
            reason = f"no Dask scheduler answers at {address!r} within {CONNECT_SECONDS:.0f} s: {exc}"
            raise BackendUnavailableError("dask", reason) from exc

    def places(self) -> Sequence[Place]:
        """Return one worker of each host."""
        try:
            workers = self.client.scheduler_info(n_workers=-1)["workers"]
        except (OSError, RuntimeError, ValueError, KeyError) as exc:  # KeyError: the client has been closed
            raise ConnectionError(f"the Dask scheduler does not answer: {exc!r}") from exc
        places: dict[str, Place] = {}
        for address in sorted(workers):
            host = workers[address]["host"]
            if host not in places:
                places[host] = Place(id=address, host=host)
        return list(places.values())

    def create_agent(self, place: Place) -> Agent:
        """Create the actor on a worker."""
        if self.client.direct_to_workers is None:
            self.client.direct_to_workers = _can_reach(place.id)  # if not, the scheduler passes calls on
        name = uuid.uuid4().hex
        options = {"actor": True, "pure": False, "workers": [place.id], "allow_other_workers": False}
        created = [self.client.submit(kind, name, **options) for kind in (Leash, NodeAgentOnWorker)]
        try:
            for future in created:
                future.result(timeout=CREATE_SECONDS)
            with self.client.as_current():  # an actor belongs to the client that is current when it is made
                actor = Actor(NodeAgentOnWorker, place.id, created[-1].key)
        except TimeoutError:
            reason = f"Dask has not created the node agent on {place.id} within {CREATE_SECONDS:.0f} s"
            raise ConnectionError(reason) from None
        except Exception as exc:
            raise ConnectionError(f"Dask cannot create the node agent on {place.id}: {exc!r}") from exc
        return DaskAgent(self.client, actor, created)

    def disconnect(self) -> None:
        """Close what :meth:`connect` has made."""
        if self._client is not None:
            self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _current_client() -> Client | None:
    """Return the client that the program uses, if there is one."""
    try:
        return distributed.get_client()
    except ValueError:
        return None


def _check_address(address: str) -> None:
    """Raise BackendUnavailableError if an address has no host or no port, or needs certificates not given."""
    try:
        distributed.comm.get_address_host_port(address)
    except (ValueError, TypeError) as exc:
        reason = f"the address of a Dask scheduler is such as tcp://10.0.0.1:8786, got {address!r}: {exc}"
        raise BackendUnavailableError("dask", reason) from None
    if address.startswith("tls:") and Security().get_connection_args("client").get("ssl_context") is None:
        reason = (
            f"the Dask scheduler at {address!r} needs certificates: make a distributed.Client(address, "
            "security=...) before the executor, or set distributed.comm.tls in Dask's configuration"
        )
        raise BackendUnavailableError("dask", reason)


def _can_reach(address: str) -> bool:
    """Return whether this process can connect to a worker; on Kubernetes often only the scheduler can."""
    if address.startswith("inproc:"):
        return True
    try:
        where = distributed.comm.get_address_host_port(address)
        socket.create_connection(where, timeout=REACH_SECONDS).close()
    except OSError:
        return False
    return True


class DaskBackend(ClusterBackend):
    """Runs tasks on the hosts of a Dask cluster.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
    """

    engine_class = DaskEngine
