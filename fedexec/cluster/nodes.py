"""The nodes of one executor: those that are ready, about to be, or lost, and the tasks that each runs."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import replace

from fedexec._channel.stderr import write_all
from fedexec.cluster.contents import Contents
from fedexec.cluster.engine import Engine, Place
from fedexec.cluster.messages import NodeOrder, NodeStatus
from fedexec.cluster.remote_node import LostError, RemoteNode
from fedexec.cluster.versions import check_versions
from fedexec.errors import (
    BackendUnavailableError,
    DeviceError,
    NodeLostError,
    PreloadError,
    SettingsError,
    WorkerDiedError,
)
from fedexec.interface import Task
from fedexec.settings import Settings
from fedexec.usage import node_name

__all__ = ["BEAT_SECONDS", "LEASE_SHARE", "Nodes"]

log = logging.getLogger("fedexec")

BEAT_SECONDS = 0.5  # how often the caller and a node agent tell each other that they live
LEASE_SHARE = (
    0.8  # of the time limit: then a node agent ends its workers, before the caller gives the node up
)
MEMBERSHIP_SECONDS = 1.0  # how often the engine is asked for new nodes
START_SECONDS = 60.0  # how long an executor that starts waits for nodes
PATIENCE_SECONDS = 5.0  # after this time it says that it waits
LEAVE_SECONDS = 1.0  # how long an executor that ends waits for an engine that is creating a node agent
AGAIN_SECONDS = 10.0  # after this time a node that could not be used is tried again
NO_NODE_SECONDS = 60.0  # how long tasks wait if all nodes were lost


class Nodes:
    """The nodes of one executor. Thread-safe.

    Parameters
    ----------
    engine : Engine
    order : NodeOrder
        What all nodes have in common.
    settings : Settings
    contents : Contents
        Is told to the nodes with each sign of life.
    slots_changed : callable
        Called without arguments when the number of slots has changed.
    """

    def __init__(
        self,
        engine: Engine,
        order: NodeOrder,
        settings: Settings,
        contents: Contents,
        slots_changed: Callable[[], object],
    ) -> None:
        self._engine = engine
        self._order = order
        self._settings = settings
        self._contents = contents
        self._slots_changed = slots_changed  # never with the lock: the scheduler calls `slots` with its own
        # Enter this lock and not the condition: Ctrl+C in Condition.__enter__ could leave it locked for ever.
        self._lock = threading.RLock()  # guards everything below
        self._changed = threading.Condition(self._lock)
        self._ready: dict[str, RemoteNode] = {}  # by id of the place
        self._opening: dict[str, RemoteNode | None] = {}
        self._refused: dict[str, tuple[float, Exception]] = {}  # when a place was found unfit, and why
        self._lost: list[RemoteNode] = []
        self._of_task: dict[int, RemoteNode] = {}
        self._rehearsals: list[tuple[bytes, str]] = []
        self._said: set[str] = set()  # what nodes have logged: many nodes say the same
        self._slots = 0
        self._at_once = False
        self._closing = threading.Event()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._send_signs_of_life, name="fedexec-beats", daemon=True),
            threading.Thread(target=self._follow_the_engine, name="fedexec-members", daemon=True),
        ]

    @property
    def slots(self) -> int:
        """How many tasks all nodes together can run at once now."""
        return self._slots

    def start(self) -> None:
        """Open the nodes that there are, and wait until they are ready.

        Raises
        ------
        BackendUnavailableError
            No node can be used.
        PreloadError, DeviceError, SettingsError
            What the nodes say.
        """
        self._open_new(self._engine.places())
        for thread in self._threads:
            thread.start()
        with self._lock:
            self._changed.wait_for(self._can_begin, PATIENCE_SECONDS)
            if not self._can_begin() and not self._opening:
                log.warning("the cluster has no node yet; waiting %.0f s for one", START_SECONDS)
            self._changed.wait_for(self._can_begin, START_SECONDS - PATIENCE_SECONDS)
            self._changed.wait_for(self._is_settled, PATIENCE_SECONDS if self._ready else 0.0)
            if not self._ready:
                raise self._no_node()
            for place_id in self._opening:
                log.warning("node %s is not ready yet; tasks begin without it", place_id)

    def ready(self) -> list[RemoteNode]:
        """Return the nodes that run tasks."""
        with self._lock:
            return list(self._ready.values())

    def known(self) -> list[RemoteNode]:
        """Return the nodes that run tasks, and those that were lost."""
        with self._lock:
            return [*self._ready.values(), *self._lost]

    def take(self, task: Task) -> RemoteNode:
        """Wait for a node with a free slot, and give it a task.

        Parameters
        ----------
        task : Task

        Returns
        -------
        RemoteNode
            The one that has the largest part of its slots free.

        Raises
        ------
        WorkerDiedError
            The task is to end.
        NodeLostError
            There has been no node for a while.
        """
        with self._lock:
            last_seen = time.monotonic()
            while True:
                if task.doomed or self._at_once:
                    raise WorkerDiedError(None, None, task.name)
                free = [node for node in self._ready.values() if node.free_slots > 0]
                if free:
                    break
                now = time.monotonic()
                if self._ready:
                    last_seen = now
                elif now - last_seen > NO_NODE_SECONDS:
                    reason = f"no node was left, and none has come for {NO_NODE_SECONDS:.0f} s"
                    raise NodeLostError(", ".join(node.name for node in self._lost), reason, task.name)
                self._changed.wait(1.0)
            node = max(free, key=lambda node: node.free_slots / node.status.slots)
            node.running[task.id] = task
            self._of_task[task.id] = node
            return node

    def give_back(self, task: Task) -> None:
        """Note that a task has ended on its node.

        Parameters
        ----------
        task : Task
        """
        with self._lock:
            node = self._of_task.pop(task.id)
            del node.running[task.id]
            self._changed.notify_all()

    def end(self, task: Task, number: int) -> None:
        """Send a signal to the worker of a task; if the task waits for a node, stop waiting.

        Parameters
        ----------
        task : Task
        number : int
        """
        with self._lock:
            node = self._of_task.get(task.id)
            self._changed.notify_all()
        if node is not None:
            node.call("end", task.id, number)

    def rehearse(self, call: bytes, name: str) -> list[str | None]:
        """Rehearse a call on each node, also on those that come later.

        Parameters
        ----------
        call : bytes
        name : str

        Returns
        -------
        list of str or None
            The answer of each node.
        """
        with self._lock:
            self._rehearsals.append((call, name))
            nodes = list(self._ready.values())
        answers = [(node, node.call("rehearse", call, name)) for node in nodes]
        wait(answer for _, answer in answers)
        errors = [answer.exception() for node, answer in answers if node.lost is None]
        for error in errors:
            if error is not None:
                with self._lock:
                    self._rehearsals.remove((call, name))
                raise error
        return [answer.result() for node, answer in answers if node.lost is None]

    def end_workers(self) -> None:
        """End all workers at once, also those that start later. This does not wait."""
        with self._lock:
            self._at_once = True
            self._changed.notify_all()
        for node in self.ready():
            node.call("close", True)

    def close(self) -> None:
        """End the workers on all nodes, and the node agents. If a node does not answer, it is lost soon."""
        self._closing.set()
        with self._lock:
            for opening in self._opening.values():
                if opening is not None:
                    opening.lose("the executor was shut down")
        nodes = self.ready()
        answers = [node.call("close", self._at_once) for node in nodes]
        wait(answers)
        for node, answer in zip(nodes, answers, strict=True):
            if answer.exception() is None:
                node.status = answer.result()
                self._pass_on(node, node.status)
        with self._lock:
            self._changed.wait_for(lambda: not any(self._opening.values()), START_SECONDS)
            # Nothing hurries an engine that is creating a node agent; it ends as soon as it is there.
            self._changed.wait_for(lambda: not self._opening, LEAVE_SECONDS)
        self._closed.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        for node in self.known():
            node.end()

    # ------------------------------------------------------------ nodes that come

    def _can_begin(self) -> bool:
        return bool(self._ready) or self._is_settled()

    def _is_settled(self) -> bool:
        return bool(self._ready or self._refused) and not self._opening

    def _follow_the_engine(self) -> None:
        while not self._closing.wait(MEMBERSHIP_SECONDS):
            try:
                places = self._engine.places()
            except ConnectionError as exc:
                log.debug("the engine does not say which nodes there are: %s", exc)
                continue
            ids = {place.id for place in places}
            for node in self.ready():
                if node.place.id not in ids:
                    node.lose("the engine says that it is gone")
            self._open_new(places)

    def _open_new(self, places: Sequence[Place]) -> None:
        """Begin to open the places that are new, or were found unfit a while ago."""
        now = time.monotonic()
        for place in places:
            with self._lock:
                refused_at = self._refused[place.id][0] if place.id in self._refused else -AGAIN_SECONDS
                is_known = place.id in self._ready or place.id in self._opening
                if is_known or now - refused_at < AGAIN_SECONDS or self._closing.is_set():
                    continue
                self._opening[place.id] = None
            threading.Thread(target=self._open, args=(place,), name="fedexec-node", daemon=True).start()

    def _open(self, place: Place) -> None:
        node = None
        try:
            node = RemoteNode(
                place, self._engine.create_agent(place), self._settings.node_timeout, self._noticed
            )
            with self._lock:
                self._opening[place.id] = node
                if self._closing.is_set():
                    raise LostError("the executor was shut down")
            patience = START_SECONDS + self._settings.preload_timeout
            check_versions(node.open(self._order_for(place), patience), node.name)
            for call, name in list(self._rehearsals):
                node.call("rehearse", call, name).result()
        except Exception as exc:
            self._refuse(place, node, exc)
            node = None
        with self._lock:
            del self._opening[place.id]
            if node is not None:
                self._ready[place.id] = node
                self._refused.pop(place.id, None)
                log.info("node %s runs up to %d tasks at once", node.name, node.status.slots)
            self._slots = sum(each.status.slots for each in self._ready.values())
            self._changed.notify_all()
        if node is not None and self._closing.is_set():
            node.lose("the executor was shut down")
        self._slots_changed()

    def _refuse(self, place: Place, node: RemoteNode | None, reason: Exception) -> None:
        if node is not None:
            node.lose(str(reason))
        with self._lock:
            is_new = place.id not in self._refused
            self._refused[place.id] = (time.monotonic(), reason)
        if is_new and not self._closing.is_set():
            log.warning("node %s cannot be used: %s", node_name(place.host, place.id), reason)

    def _order_for(self, place: Place) -> NodeOrder:
        workers = self._settings.node_workers or place.cores
        given = {**self._order.settings, **({} if workers is None else {"max_workers": workers})}
        return replace(self._order, settings=given)

    def _no_node(self) -> Exception:
        """Return the error for a cluster none of whose nodes can be used."""
        errors = [error for _, error in self._refused.values()]
        for error in errors:
            if isinstance(error, PreloadError | DeviceError | SettingsError):
                return error
        reasons = (
            "; ".join(dict.fromkeys(str(error).rstrip(".") for error in errors))
            or f"it has no node after {START_SECONDS:.0f} s"
        )
        return BackendUnavailableError(self._settings.backend, reasons)

    # ------------------------------------------------------------ nodes that are ready

    def _send_signs_of_life(self) -> None:
        while not self._closed.wait(BEAT_SECONDS):
            newest, alive = self._contents.alive()
            for node in self.ready():
                node.send_sign_of_life(newest, alive)

    def _noticed(self, node: RemoteNode, status: NodeStatus | None) -> None:
        """Note the status of a node, or that it was lost."""
        if status is not None:
            self._pass_on(node, status)
        with self._lock:
            before = self._slots
            for task_id, pid in (status.pids if status is not None else {}).items():
                if task_id in node.running:
                    node.running[task_id].pid = pid
            if status is None and self._ready.get(node.place.id) is node:
                del self._ready[node.place.id]
                self._lost.append(node)
                if not self._closing.is_set():
                    log.warning("node %s was lost: %s", node.name, node.lost)
            self._slots = sum(each.status.slots for each in self._ready.values())
            has_changed = before != self._slots
            self._changed.notify_all()
        if has_changed:
            self._slots_changed()

    def _pass_on(self, node: RemoteNode, status: NodeStatus) -> None:
        """Write what tasks have written, and log what a node is the first to say."""
        for stream, data in status.output:
            write_all(stream, data)
        for level, text in status.records:
            with self._lock:
                is_new = text not in self._said
                self._said.add(text)
            log.log(level if is_new else logging.DEBUG, "node %s: %s", node.name, text)
