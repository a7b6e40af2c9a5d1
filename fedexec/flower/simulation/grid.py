"""Flower's Grid over an Executor: a ServerApp exchanges messages with ClientApps without SuperLink or Ray."""

import functools
import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedexec.errors import InitializerError, PreloadError
from fedexec.executor import Executor
from fedexec.flower.flower_internals import ErrorCode, Run, empty_run
from fedexec.flower.history import TaskRecord
from fedexec.flower.record_packing import Packed, pack
from fedexec.flower.simulation.client_app import Answer, AppRef, MessageTask, run
from fedexec.flower.simulation.failure_log import FailureLog
from fedexec.flower.simulation.module_caches import Refills
from fedexec.flower.simulation.nodes import (
    Node,
    NodeConfig,
    NodeResources,
    Resources,
    config_of,
    longest_first,
)
from fedexec.flower.simulation.pending_message import (
    PendingMessage,
    await_answers,
    error_answer,
    make_pending,
    make_reply,
    require_time_left,
)
from fedexec.flower.simulation.rehearsals import Rehearsals
from fedexec.flower.simulation.run_recorder import RunRecorder
from fedexec.interface import Capability

__all__ = ["ExecutorGrid"]

log = logging.getLogger("fedexec.flower")


class ExecutorGrid(Grid):
    """Sends each message to a worker of an executor; it can be used from many threads.

    If a node fails (its ClientApp raises, its worker dies or takes too long), its message gets an error reply
    with one of Flower's codes, and the node can take the next message. Messages to the same node run one
    after the other. Replies are in the order of the partitions.

    Parameters
    ----------
    executor : Executor
    client_app : ClientApp or str
        The app, or its place: ``"module:attribute"``.
    num_nodes : int
    run_config : mapping, optional
        What the app finds in ``context.run_config``.
    node_config : mapping, or callable ``(partition_id) -> mapping``, optional
        What a node finds in ``context.node_config``, in addition to ``partition-id`` and ``num-partitions``.
    node_resources : mapping, or callable ``(partition_id) -> mapping``, optional
        What a node's messages need; see :func:`fedexec.flower.simulate`.
    seed : int, optional
        Determines the node ids and, if workers are processes, the state of the global random generators for
        each message. Default: a random one.
    recorder : RunRecorder, optional
        Records what happens.
    rehearse : bool
        Whether to rehearse the first message of each type; see :func:`fedexec.flower.simulate`.
    run_id : int
    """

    def __init__(
        self,
        executor: Executor,
        client_app: ClientApp | str,
        *,
        num_nodes: int,
        run_config: Mapping[str, Any] | None = None,
        node_config: NodeConfig | None = None,
        node_resources: NodeResources | None = None,
        seed: int | None = None,
        recorder: RunRecorder | None = None,
        rehearse: bool = False,
        run_id: int = 1,
    ) -> None:
        self.executor = executor
        self.num_nodes = num_nodes
        self.recorder = recorder or RunRecorder()
        self._isolated = Capability.ISOLATED in executor.capabilities
        if isinstance(client_app, str):
            self.app: ClientApp | AppRef = AppRef(client_app)
        else:
            self.app = AppRef.of(client_app) if self._isolated else client_app
        self._run_config = dict(run_config or {})
        self._node_config = node_config or {}
        self._resources = Resources(executor, node_resources or {}, num_nodes)
        # Forked workers inherit equal generators, so workers are always seeded, with different seeds.
        self._seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        self._run = empty_run(run_id)
        ids = random.Random(f"nodes/{self._seed}").sample(range(1, 2**63), num_nodes)
        self._partitions = {node_id: partition for partition, node_id in enumerate(ids)}
        self._rehearses, self._rehearsals = rehearse, Rehearsals(executor)
        self._refills = Refills()
        self._lock = threading.RLock()  # guards everything below
        self._failures = FailureLog()
        self._nodes: dict[int, Node] = {}  # nodes that have had a message
        self._pending: dict[str, PendingMessage] = {}

    # ------------------------------------------------------------ Flower's Grid

    @property
    def run(self) -> Run:
        """The run of this grid."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run of this grid.

        Parameters
        ----------
        run : Run
        """
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message, as ``Message(...)`` does.

        Parameters
        ----------
        content : RecordDict
        message_type : str
        dst_node_id : int
        group_id : str
            The round, by Flower's convention.
        ttl : float, optional
            Seconds.

        Returns
        -------
        Message
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the id of every node, in the order of the partitions."""
        return list(self._partitions)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages to their nodes.

        Parameters
        ----------
        messages : iterable of Message

        Returns
        -------
        list of str
            The messages' ids.

        Raises
        ------
        ValueError
            A message is a reply, or its ``ttl`` is over before it is sent.
        """
        sent = self._prepare_all(messages, lambda message_id: None)
        self._enqueue_all(sent)
        return [pending.id for pending in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that have arrived.

        Parameters
        ----------
        message_ids : iterable of str

        Returns
        -------
        list of Message
            Each reply is returned once. A message whose ``ttl`` is over gets an error.
        """
        with self._lock:
            pending_messages = [
                self._pending[each] for each in dict.fromkeys(message_ids) if each in self._pending
            ]
        self._expire(pending_messages)
        return self._deliver([pending for pending in pending_messages if pending.answer is not None])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages, and wait for the replies.

        Parameters
        ----------
        messages : iterable of Message
        timeout : float, optional
            Seconds; replies that are missing then are given up.

        Returns
        -------
        list of Message
            The replies that have arrived.
        """
        answered_ids: queue.SimpleQueue[str] = queue.SimpleQueue()
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        sent = self._prepare_all(messages, answered_ids.put)
        unanswered = {pending.id: pending for pending in sent}
        try:
            self._enqueue_all(sent)
            while unanswered and time.monotonic() < deadline:
                first = min(pending.expires for pending in unanswered.values())
                await_answers(answered_ids, unanswered, min(deadline, first))
                self._expire(unanswered.values())
        finally:  # also after Ctrl+C
            late = "the caller no longer waits" if timeout is None else f"no reply within {timeout:g} s"
            for pending in unanswered.values():
                self._give_up(pending, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, late)
                self._pending.pop(pending.id, None)
        return self._deliver([pending for pending in sent if pending.id not in unanswered])

    def close(self) -> None:
        """Give up the messages that have no answer."""
        with self._lock:
            pending_messages = list(self._pending.values())
        for pending in pending_messages:
            late = "the run was over before it was done"
            self._give_up(pending, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, late, failed=False)

    # ------------------------------------------------------------ to the nodes

    def _prepare_all(
        self, messages: Iterable[Message], on_answer: Callable[[str], object]
    ) -> list[PendingMessage]:
        messages = list(messages)
        for message in messages:  # Check all first: a message with a rehearsal may take long to send.
            require_time_left(message)
        prepared: list[PendingMessage] = []
        last: tuple[RecordDict, Packed] | None = None
        for message in messages:
            if last is None or last[0] is not message.content:  # A round's messages share their content.
                last = message.content, pack(message.content)
            prepared.append(make_pending(message, last[1], self._partitions, on_answer))
        return prepared

    def _enqueue_all(self, pending_messages: Sequence[PendingMessage]) -> None:
        for pending in longest_first(pending_messages, self._nodes):
            self._enqueue(pending)

    def _enqueue(self, pending: PendingMessage) -> None:
        with self._lock:
            self._pending[pending.id] = pending
            if pending.partition < 0:
                reason = f"it is none of the {self.num_nodes} nodes of this simulation"
                self._answer(pending, Answer(error=(ErrorCode.NODE_UNAVAILABLE, reason)))
                return
            pending.round = self.recorder.sent(pending.kind, pending.partition, pending.server_round)
            node = self._nodes.setdefault(pending.node_id, Node())
            node.waiting.append(pending)
            if node.busy:
                return
            node.busy = True
        self._send_next(node)

    def _send_next(self, node: Node) -> None:
        """Send a node its next message, if there is one."""
        with self._lock:
            node.busy = bool(node.waiting)
            if not node.busy:
                return
            pending = node.waiting.popleft()
        try:
            executor = self._resources.executor_for(pending.partition)
            task = self._task_of(pending, node)
            if self._rehearses:
                self._rehearsals.rehearse(task)
            pending.future = executor.submit(run, task)
        # The executor is broken or shut down, or the node_config is not valid.
        except Exception as exc:
            self._answer(pending, Answer(error=(ErrorCode.UNKNOWN, repr(exc))), fatal=exc)
            self._send_next(node)
            return
        finally:
            pending.content = None
        if pending.answer is not None:  # The message was given up meanwhile.
            self.executor.end(pending.future)
        pending.future.add_done_callback(functools.partial(self._receive, pending, node))

    def _task_of(self, pending: PendingMessage, node: Node) -> MessageTask:
        seed = None
        if self._isolated:  # Threads share the generators, so seeds would not make the run reproducible.
            seed = random.Random(f"{self._seed}/{pending.partition}/{node.messages}").getrandbits(32)
        node.messages += 1
        assert pending.content is not None
        return MessageTask(
            app=self.app,
            content=pending.content,
            metadata=pending.metadata,
            node_config=config_of(self._node_config, pending.partition, self.num_nodes),
            run_config=self._run_config,
            state=node.state,
            seed=seed,
            isolated=self._isolated,
        )

    # ------------------------------------------------------------ from the nodes

    def _receive(self, pending: PendingMessage, node: Node, future: Future[Answer]) -> None:
        """Note an answer, and send the node its next message; this is a callback, so it must not raise."""
        try:
            answer, fatal = future.result(), None
        except BaseException as exc:
            answer = error_answer(exc)
            fatal = exc if isinstance(exc, InitializerError | PreloadError) else None
        with self._lock:
            usage = getattr(future, "usage", None)
            if usage is not None:
                node.seconds[pending.kind] = usage.wall_seconds
            if self._answer(pending, answer, future, fatal=fatal):
                node.state = node.state if answer.state is None else answer.state
        self._send_next(node)

    def _answer(
        self,
        pending: PendingMessage,
        answer: Answer,
        future: Future[Answer] | None = None,
        fatal: BaseException | None = None,
        *,
        failed: bool = True,
    ) -> bool:
        """Set the answer of a message; return False if it is set already.

        With `failed` false, an error does not count as a failure, because no caller has waited for the reply.
        """
        with self._lock:
            if pending.answer is not None:
                return False
            pending.answer, pending.fatal = answer, fatal
            error = None if answer.error is None else answer.error[1]
            record = self.recorder.answered(
                pending.kind, pending.partition, pending.server_round, error, future, pending.round,
                failed=failed,
            )  # fmt: skip
            self._advise(record, answer.filled)
            if failed and error is not None:
                self._failures.note(pending.where, error, answer.traceback)
        pending.on_answer(pending.id)
        return True

    def _advise(self, record: TaskRecord, filled: tuple[str, ...]) -> None:
        usage = record.usage
        if usage is None or self._rehearses or Capability.FRESH_PROCESS not in self.executor.capabilities:
            return
        hint = self._refills.note(record.kind, filled, usage.wall_seconds - (usage.import_seconds or 0.0))
        if hint:
            log.warning("%s", hint)

    def _expire(self, pending_messages: Iterable[PendingMessage]) -> None:
        now = time.monotonic()
        for pending in pending_messages:
            if pending.expires <= now:
                ttl = pending.metadata.ttl
                self._give_up(pending, ErrorCode.MESSAGE_UNAVAILABLE, f"no reply within its ttl of {ttl:g} s")

    def _give_up(self, pending: PendingMessage, code: int, reason: str, *, failed: bool = True) -> None:
        """Answer a message with an error, and end its worker, because its result is not needed any more."""
        if not self._answer(pending, Answer(error=(code, reason)), failed=failed):
            return
        with self._lock:
            node = self._nodes.get(pending.node_id)
            if node is not None and pending in node.waiting:
                node.waiting.remove(pending)
        if pending.future is not None:
            self.executor.end(pending.future)

    def _deliver(self, pending_messages: Iterable[PendingMessage]) -> list[Message]:
        """Make the replies, in an order that does not depend on which answer came first."""
        replies = []
        for pending in sorted(pending_messages, key=lambda pending: pending.partition):
            with self._lock:
                del self._pending[pending.id]
            if pending.fatal is not None:
                raise pending.fatal
            assert pending.answer is not None
            replies.append(make_reply(pending, pending.answer))
            # This frees the shared memory of the answer for the next messages.
            pending.answer = Answer()
        return replies
