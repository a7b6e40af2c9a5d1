"""The cluster backend: it pickles tasks, gives each to a node, and makes an outcome of the node's answer."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedexec._channel.changed import Changed
from fedexec._channel.initargs import PackedHook
from fedexec._channel.pickling import Packed, dumps
from fedexec._channel.task_channel import pack
from fedexec._registry import load
from fedexec._system.available_resources import SIGKILL
from fedexec.cluster.contents import Content, Contents
from fedexec.cluster.engine import Engine
from fedexec.cluster.messages import NodeOrder, NodeTask, Surroundings, own_path, unpack_error
from fedexec.cluster.nodes import BEAT_SECONDS, LEASE_SHARE, Nodes
from fedexec.cluster.remote_node import LostError, RemoteNode
from fedexec.errors import NodeLostError, SettingsError, UnpickleError, WorkerError
from fedexec.interface import Backend, Capability, Hooks, Node, Outcome, Task, function_name
from fedexec.settings import Settings

__all__ = ["ClusterBackend"]

LEAST_TIMEOUT = 2.0  # seconds

log = logging.getLogger("fedexec")

# Settings of the caller alone; a task carries its time limit and its seed.
_OWN = ("backend", "max_workers", "timeout", "retries", "log_level", "seed", "node_", "ray_", "dask_")


class ClusterBackend(Backend):
    """Runs each task on a node of a cluster. A subclass names its engine.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks

    Attributes
    ----------
    engine_class : type of Engine
    """

    capabilities = (
        Capability.ISOLATED
        | Capability.FRESH_PROCESS
        | Capability.SURVIVES_DEATH
        | Capability.KILLS_ONE
        | Capability.STANDS_BY
        | Capability.REMOTE
    )
    engine_class: type[Engine]

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        super().__init__(settings, hooks)
        _check(settings)
        order = _order(settings, hooks)
        self._engine = self.engine_class(settings)
        self._contents = Contents(self._engine.put)
        self._nodes = Nodes(self._engine, order, settings, self._contents, lambda: self.slots_changed())
        self._path = Changed(own_path)

    def start(self) -> None:
        """Connect to the cluster, and wait until its nodes are ready.

        Raises
        ------
        BackendUnavailableError
            There is no cluster, or none of its nodes can be used.
        PreloadError, DeviceError, SettingsError
            What the nodes say.
        """
        self._engine.connect()
        self._nodes.start()
        node = self._nodes.ready()[0]
        self.capabilities = node.capabilities & ~Capability.SHARES_MEMORY | Capability.REMOTE

    def run(self, task: Task) -> Outcome:
        """Run one task on the node that has the most room.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Outcome

        Raises
        ------
        NodeLostError
            The node was lost.
        """
        packed = pack(task)
        with self._contents.lend(packed.buffers, task.submitted) as lent:
            message = self._message(task, packed, lent.buffers)
            del packed
            return self._run(task, message, lent.contents)

    def kill(self, task: Task, number: int = SIGKILL) -> None:
        """End the worker of a task; see :meth:`Backend.kill`."""
        self._nodes.end(task, number)

    def kill_waiting(self) -> None:
        """End all workers on all nodes at once."""
        self._nodes.end_workers()

    def slots(self) -> int:
        """Return how many tasks all nodes together can run at once now."""
        return self._nodes.slots

    def nodes(self) -> tuple[Node, ...]:
        """Return the nodes that run tasks."""
        return tuple(
            replace(node.description, id=node.place.id, slots=node.status.slots)
            for node in self._nodes.ready()
            if node.description is not None
        )

    def restarts(self) -> Mapping[str, int]:
        """Return how many workers were replaced, on all nodes together."""
        return sum((Counter(node.status.restarts) for node in self._nodes.known()), Counter())

    def learning(self) -> Mapping[str, Any]:
        """Return what the templates have learnt, by node."""
        return {node.name: node.status.learning for node in self._nodes.known() if node.status.learning}

    def footprints(self) -> Mapping[str, Any]:
        """Return the footprint of each kind of task on the node where it took the most memory."""
        largest: dict[str, Any] = {}
        for node in self._nodes.known():
            for kind, footprint in node.status.footprints.items():
                known = largest.setdefault(kind, footprint)
                if (footprint.host_bytes or 0) > (known.host_bytes or 0):
                    largest[kind] = footprint
        return largest

    def rehearse(self, call: Callable[[], object], name: str) -> str | None:
        """Make a call on each node, also on those that come later; see :meth:`Backend.rehearse`."""
        return next(
            (reason for reason in self._nodes.rehearse(dumps(call), name) if reason is not None), None
        )

    def shutdown(self) -> None:
        """End the workers on all nodes, then leave the cluster."""
        self._nodes.close()
        self._contents.close()
        self._engine.disconnect()

    # ------------------------------------------------------------

    def _message(self, task: Task, packed: Packed, buffers: tuple[Any, ...]) -> NodeTask:
        return NodeTask(
            id=task.id,
            data=packed.data,
            buffers=buffers,
            sources=packed.sources,
            path=self._path.value(),
            kind=task.kind,
            tag=task.tag,
            timeout=task.timeout,
            seed=task.seed,
            needs=task.needs,
        )

    def _run(self, task: Task, message: NodeTask, contents: Sequence[Content]) -> Outcome:
        node = self._nodes.take(task)
        try:
            reply = node.run(message, contents)
        except LostError as exc:
            raise NodeLostError(node.name, str(exc), task.name) from None
        finally:
            self._nodes.give_back(task)
        if reply.error is not None:
            error = unpack_error(reply.error)
            if isinstance(error, WorkerError):
                error.node = node.name
            raise error
        assert reply.reply is not None
        outcome = reply.reply.outcome(task)
        if isinstance(outcome.exception, UnpickleError):
            self._explain(outcome.exception, node)
        if outcome.usage is not None and node.description is not None:
            outcome.usage = replace(outcome.usage, node=node.description.host)
        return outcome

    def _explain(self, error: UnpickleError, node: RemoteNode) -> None:
        """Say what to do if a node cannot import a module of the caller."""
        if isinstance(error.__cause__, ModuleNotFoundError) and node.description is not None:
            error.add_note(
                f"fedexec: node {node.name} cannot import {error.__cause__.name!r}. {self._engine.shipping}"
            )


def _check(settings: Settings) -> None:
    """Raise SettingsError if a setting of nodes makes no sense."""
    if settings.node_timeout < LEAST_TIMEOUT:
        raise SettingsError(
            f"node_timeout must be at least {LEAST_TIMEOUT:g} seconds, because signs of life are "
            f"{BEAT_SECONDS:g} s apart, got {settings.node_timeout:g}"
        )
    promises = load(settings.node_backend).capabilities
    if Capability.ISOLATED not in promises or Capability.REMOTE in promises:
        raise SettingsError(
            f"node_backend must run tasks in other processes of the node, got {settings.node_backend!r}"
        )


def _order(settings: Settings, hooks: Hooks) -> NodeOrder:
    """Return what all nodes have in common."""
    given = {
        name: value
        for name, value in settings.as_dict().items()
        if settings.sources.get(name, "default") != "default" and not name.startswith(_OWN)
    }
    return NodeOrder(
        settings={**given, "backend": settings.node_backend, "retries": 0},
        initializer=_pack_hook(hooks.initializer, *hooks.initargs),
        warmup=_pack_hook(hooks.warmup),
        log_level=log.getEffectiveLevel(),
        surroundings=Surroundings.of_this_process(),
        lease_seconds=LEASE_SHARE * settings.node_timeout,
    )


def _pack_hook(hook: Callable[..., object] | None, *args: object) -> PackedHook | None:
    if hook is None:
        return None
    try:
        return PackedHook(dumps(functools.partial(hook, *args)), function_name(hook))
    except RuntimeError as exc:
        exc.add_note(
            "fedexec: locks, queues and pipes of multiprocessing exist on one machine only, so nodes of a "
            "cluster cannot use them"
        )
        raise
