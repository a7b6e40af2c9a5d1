"""``ray``: tasks run on the nodes of a Ray cluster, each in a process of its own.

Each node gets a node agent, as an actor. It takes no CPUs, so it makes no other task wait, and all GPUs,
because Ray hides GPUs from actors that do not ask for them.
"""

import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import ray
from ray._private import state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedexec.backend import BackendUnavailableError, Settings
from fedexec.cluster import Agent, Blob, ClusterBackend, Engine, NodeAgent, Place

__all__ = ["RayBackend"]

log = logging.getLogger("fedexec")

LOCAL = "local"
CLIENT = "ray://"  # addresses of Ray's client: the head of the cluster acts for a program elsewhere
CREATE_SECONDS = 30.0
LEAVE_SECONDS = 5.0
MOST_CALLS = 100_000  # at once, for one node agent


class RayAgent(Agent):
    """An actor of Ray.

    Parameters
    ----------
    actor : ray.actor.ActorHandle
    unanswered : set of Future
        Calls that have no answer yet; the engine does not leave Ray before they have one.
    """

    def __init__(self, actor: Any, unanswered: "set[Future[Any]]") -> None:
        self._actor = actor
        self._unanswered = unanswered

    def call(self, method: str, *args: Any) -> "Future[Any]":
        """Call a method of the node agent; see :meth:`Agent.call`."""
        try:
            called = getattr(self._actor, method).remote(*args)
        except Exception as exc:  # Ray raises different ones, for instance if the program has left it
            raise ConnectionError(_first_line(exc)) from exc
        answer: Future[Any] = Future()
        self._unanswered.add(answer)
        answer.add_done_callback(self._unanswered.discard)
        called.future().add_done_callback(lambda done: _pass_on(done, answer))
        return answer

    def discard(self) -> None:
        """End the actor's process."""
        try:
            ray.kill(self._actor, no_restart=True)
        except Exception:  # Ray was shut down, which has ended the actor
            return


_lock = threading.Lock()
_users: "set[RayEngine]" = set()  # the engines that need the connection that one of them has made
_has_left = threading.Event()


def _stay(init: Callable[[], object]) -> None:
    """Make a call in a thread that stays until Ray is left: what Ray has started ends with the thread.

    In a thread that is not the main thread, Ray also leaves the program's handler of SIGTERM alone.
    """
    done: Future[None] = Future()

    def stay() -> None:
        _has_left.clear()
        try:
            init()
        except BaseException as exc:
            done.set_exception(exc)
        else:
            done.set_result(None)
            _has_left.wait()

    threading.Thread(target=stay, name="fedexec-ray", daemon=True).start()
    done.result()


class RayEngine(Engine):
    """A Ray cluster: the one that the program uses, else the one at the address, else one on this machine.

    Parameters
    ----------
    settings : Settings
    """

    shipping = (
        "Install the module on all nodes, put it into a directory that they share, or send it along: "
        "ray.init(address, runtime_env={'working_dir': '.'}) before the executor is made."
    )

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._unanswered: set[Future[Any]] = set()

    def connect(self) -> None:
        """Connect to the cluster, or start one on this machine. A process has one connection to Ray."""
        with _lock:
            if ray.is_initialized():
                self._compare_address()
            if ray.is_initialized() and not _users:
                return  # the connection is the program's own
            if not ray.is_initialized():
                _stay(self._init)
            _users.add(self)

    def _compare_address(self) -> None:
        given, actual = self.settings.ray_address, ray.get_runtime_context().gcs_address
        if given not in (None, LOCAL, "auto", actual):
            log.warning(
                "this process is connected to the Ray cluster at %s, and a process has one connection, so "
                "ray_address=%s is not used", actual, given,
            )  # fmt: skip

    def _init(self) -> None:
        address = self.settings.ray_address or os.environ.get("RAY_ADDRESS") or LOCAL
        if address == LOCAL:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of ours reports to nobody
        rays_log = logging.getLogger("ray._private.worker")
        rays_log.addFilter(_is_of_interest)
        try:
            if address not in (LOCAL, "auto"):
                _require_answer(address)
            options: dict[str, Any] = {"namespace": "fedexec", "logging_level": "warning"}
            if not address.startswith(CLIENT):
                options["configure_logging"] = False
            if address == LOCAL:
                options["include_dashboard"] = False
            ray.init(address, **options)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError) as exc:
            reason = (
                f"Ray does not connect to the cluster at {address!r}: {_first_line(exc)} (if the cluster "
                "asks for a token or uses TLS, so must this process: RAY_AUTH_MODE=token, RAY_USE_TLS=1)"
            )
            raise BackendUnavailableError("ray", reason) from exc
        finally:
            rays_log.removeFilter(_is_of_interest)

    def places(self) -> Sequence[Place]:
        """Return the nodes that Ray believes to be alive, without those that offer no CPU."""
        if not ray.is_initialized():  # or Ray would start a cluster of its own
            raise ConnectionError("this program has left Ray")
        try:
            nodes = ray.nodes()
        except Exception as exc:
            raise ConnectionError(_first_line(exc)) from exc
        return [
            Place(
                id=node["NodeID"],
                host=node["NodeManagerHostname"],
                cores=max(1, int(node["Resources"]["CPU"])),
            )
            for node in nodes
            if node["Alive"] and node["Resources"].get("CPU")
        ]

    def create_agent(self, place: Place) -> Agent:
        """Create the actor on a node."""
        resources = {each["NodeID"]: each["Resources"] for each in ray.nodes()}.get(place.id, {})
        options = {
            "num_cpus": 0,
            "num_gpus": resources.get("GPU", 0),
            "max_restarts": 0,
            "max_task_retries": 0,
            "max_concurrency": MOST_CALLS,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(place.id, soft=False),
        }
        actor = ray.remote(NodeAgent).options(**options).remote()
        try:
            ray.get(actor.__ray_ready__.remote(), timeout=CREATE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            ray.kill(actor)
            raise ConnectionError(_why_it_waits(place, options["num_gpus"])) from None
        except ray.exceptions.RayError as exc:
            ray.kill(actor)
            raise ConnectionError(f"Ray cannot create the node agent there: {_first_line(exc)}") from exc
        return RayAgent(actor, self._unanswered)

    def put(self, blob: Blob) -> Any:
        """Put a buffer into the object store, from which each node fetches it once."""
        return ray.put(blob)

    def disconnect(self) -> None:
        """Leave the cluster if :meth:`connect` has connected to it and no other executor needs it."""
        wait(list(self._unanswered), LEAVE_SECONDS)  # Ray does not survive answers that come too late
        with _lock:
            if self in _users:
                _users.remove(self)
                if not _users:
                    ray.shutdown()
                    _has_left.set()


def _why_it_waits(place: Place, gpus: float) -> str:
    """Say why Ray has not created a node agent, and which actors of others run on the node."""
    waited = f"Ray has not created the node agent there within {CREATE_SECONDS:.0f} s"
    try:
        actors = [each for each in state.actors().values() if each["State"] == "ALIVE"]
        there = [
            f"{each['ActorClassName']} (process {each['Pid']}, job {each['JobID']})"
            for each in actors
            if each["Address"]["NodeID"] == place.id
        ]
    except Exception:  # not a public interface of Ray
        there = []
    needs = f"; it needs all {gpus:g} GPU(s) of the node" if gpus else ""
    holders = f"; actors that run there: {', '.join(sorted(there))}" if there else ""
    return waited + needs + holders


def _is_of_interest(record: logging.LogRecord) -> bool:
    """Return False for the warning that Ray sets no handler of SIGTERM, which is what is wanted."""
    return "SIGTERM handler" not in record.getMessage()


def _require_answer(address: str) -> None:
    """Raise BackendUnavailableError if nothing listens at an address; Ray itself would wait for long."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not (host and port.isdecimal()) or "/" in host:
        raise BackendUnavailableError(
            "ray",
            f"the address of a cluster is such as 10.0.0.1:6379 or {CLIENT}10.0.0.1:10001, got {address!r}",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except (OSError, OverflowError) as exc:
        raise BackendUnavailableError("ray", f"no Ray cluster answers at {address!r}: {exc}") from exc


def _pass_on(done: "Future[Any]", answer: "Future[Any]") -> None:
    try:
        answer.set_result(done.result())
    except ray.exceptions.RayError as exc:
        answer.set_exception(ConnectionError(f"Ray: {_first_line(exc)}"))
    except BaseException as exc:
        answer.set_exception(exc)


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip() or repr(exc)).splitlines()[0]


class RayBackend(ClusterBackend):
    """Runs tasks on the nodes of a Ray cluster.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
    """

    engine_class = RayEngine
