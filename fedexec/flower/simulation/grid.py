"""Flower's Grid over an Executor: a ServerApp talks to ClientApps, without a SuperLink and without Ray."""

import functools
import logging
import queue
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedexec.errors import FedexecError, InitializerError, PreloadError
from fedexec.executor import Executor
from fedexec.flower.flower_internals import (
    NUM_PARTITIONS_KEY,
    PARTITION_ID_KEY,
    ErrorCode,
    Run,
    empty_run,
    stamp,
)
from fedexec.flower.history import TaskRecord, cost_of
from fedexec.flower.record_packing import Packed, pack
from fedexec.flower.simulation.client_app import Answer, AppFirst, AppRef, MessageTask, answer_or_raise, run
from fedexec.flower.simulation.module_caches import Refills
from fedexec.flower.simulation.pending_message import PendingMessage, failed, make_reply
from fedexec.flower.simulation.run_recorder import RunRecorder, server_round_of
from fedexec.interface import Capability

__all__ = ["ExecutorGrid", "NodeConfig", "NodeConfigError"]

log = logging.getLogger("fedexec.flower")

REHEARSALS = 3  # of one type of message, until one goes well

NodeConfig = Mapping[str, Any] | Callable[[int], Mapping[str, Any]]


class NodeConfigError(FedexecError, ValueError):
    """A node_config that Flower could not carry; the message names the node."""


@dataclass(slots=True)
class _Node:
    """What is remembered of a node that has had a message."""

    state: bytes = b""
    messages: int = 0
    waiting: deque[PendingMessage] = field(default_factory=deque)
    busy: bool = False


class ExecutorGrid(Grid):
    """Sends each message to a worker of an executor. Safe to use from many threads.

    A node that fails (its ClientApp raises, its worker dies or takes too long) gives one error reply, with
    one of Flower's codes, and takes the next message as if nothing had happened. The messages of one node run
    one after the other. Replies come in the order of the partitions.

    Parameters
    ----------
    executor : Executor
    client_app : ClientApp or str
        The app, or where it is: ``"module:attribute"``.
    num_nodes : int
    run_config : mapping, optional
        What the app finds in ``context.run_config``.
    node_config : mapping, or callable ``(partition_id) -> mapping``, optional
        What a node finds in ``context.node_config`` besides ``partition-id`` and ``num-partitions``.
    seed : int, optional
        Node ids follow from it and, where workers are processes, the state of the global random generators
        for each message. Default: another one each time.
    recorder : RunRecorder, optional
        Is told what happens.
    rehearse : bool
        Whether the first message of each type is handled once more, before it is sent, in the process that
        workers are forked from; see :meth:`fedexec.Executor.rehearse`.
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
        # Forked workers are born with equal generators: they are seeded in any case, to differ.
        self._seed = random.SystemRandom().getrandbits(32) if seed is None else seed
        self._run = empty_run(run_id)
        ids = random.Random(f"nodes/{self._seed}").sample(range(1, 2**63), num_nodes)
        self._partitions = {node_id: partition for partition, node_id in enumerate(ids)}
        self._rehearses = rehearse
        self._rehearsing = threading.Lock()  # guards the next
        self._rehearsals: Counter[str] = Counter()  # that were tried, by the type of message
        self._refills = Refills()
        self._lock = threading.RLock()  # guards everything below
        self._nodes: dict[int, _Node] = {}  # those that have had a message
        self._pending: dict[str, PendingMessage] = {}

    # ------------------------------------------------------------ what Flower's Grid is

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; ``Message(...)`` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return the id of every node, in the order of their partitions."""
        return list(self._partitions)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Send messages to their nodes; return their ids.

        Raises
        ------
        ValueError
            A message that is a reply, or whose time is up before it is sent.
        """
        return [pending.id for pending in self._push(messages, lambda message_id: None)]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies that are there, each once. A message whose ``ttl`` is over gets an error."""
        with self._lock:
            pending_messages = [
                self._pending[each] for each in dict.fromkeys(message_ids) if each in self._pending
            ]
        self._expire(pending_messages)
        return self._deliver([pending for pending in pending_messages if pending.answer is not None])

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for the replies; give up those that are missing after `timeout` seconds."""
        landed: queue.SimpleQueue[str] = queue.SimpleQueue()
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        unanswered: dict[str, PendingMessage] = {}
        try:
            for pending in self._push(messages, landed.put):
                unanswered[pending.id] = pending
            sent = list(unanswered.values())
            while unanswered and time.monotonic() < deadline:
                first = min(pending.expires for pending in unanswered.values())
                _await_landing(landed, unanswered, min(deadline, first))
                self._expire(unanswered.values())
        finally:  # Ctrl+C too
            late = f"no reply within {timeout:g} s" if timeout is not None else "nobody waits for it any more"
            for pending in unanswered.values():
                self._give_up(pending, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, late)
                self._pending.pop(pending.id, None)
        return self._deliver([pending for pending in sent if pending.id not in unanswered])

    def close(self) -> None:
        """Give up what is still on its way."""
        with self._lock:
            pending_messages = list(self._pending.values())
        for pending in pending_messages:
            late = "the run was over before it was done"
            self._give_up(pending, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, late, failed=False)

    # ------------------------------------------------------------ out

    def _push(self, messages: Iterable[Message], landed: Callable[[str], object]) -> Iterator[PendingMessage]:
        messages = list(messages)
        for message in messages:  # Before any is sent: to send one may take long, if it is rehearsed first.
            _require_time_left(message)
        last: tuple[RecordDict, Packed] | None = None
        for message in messages:
            if last is None or last[0] is not message.content:  # a round's messages share their content
                last = message.content, pack(message.content)
            pending = self._prepare(message, last[1], landed)
            self._take_off(pending)
            yield pending

    def _prepare(self, message: Message, content: Packed, landed: Callable[[str], object]) -> PendingMessage:
        metadata = message.metadata
        left = metadata.created_at + metadata.ttl - time.time()
        stamp(message)
        partition = self._partitions.get(metadata.dst_node_id, -1)
        expires = time.monotonic() + left
        return PendingMessage(metadata, content, partition, server_round_of(message), expires, landed)

    def _take_off(self, pending: PendingMessage) -> None:
        with self._lock:
            self._pending[pending.id] = pending
            if pending.partition < 0:
                reason = f"it is none of the {self.num_nodes} nodes of this simulation"
                self._answer(pending, Answer(error=(ErrorCode.NODE_UNAVAILABLE, reason)))
                return
            pending.round = self.recorder.sent(pending.kind, pending.partition, pending.server_round)
            node = self._nodes.setdefault(pending.node_id, _Node())
            node.waiting.append(pending)
            if node.busy:
                return
            node.busy = True
        self._send_next(node)

    def _send_next(self, node: _Node) -> None:
        """Send a node its next message, if there is one."""
        with self._lock:
            node.busy = bool(node.waiting)
            if not node.busy:
                return
            pending = node.waiting.popleft()
        try:
            executor = self.executor.with_options(tag=f"partition {pending.partition}")
            task = self._task_of(pending, node)
            if self._rehearses:
                self._rehearse(task)
            pending.future = executor.submit(run, task)
        except Exception as exc:  # the executor is broken or shut down; a node_config makes no sense
            self._answer(pending, Answer(error=(ErrorCode.UNKNOWN, repr(exc))), fatal=exc)
            self._send_next(node)
            return
        finally:
            pending.content = None
        if pending.answer is not None:  # given up meanwhile
            self.executor.end(pending.future)
        pending.future.add_done_callback(functools.partial(self._land, pending, node))

    def _rehearse(self, task: MessageTask) -> None:
        kind = task.metadata.message_type
        with self._rehearsing:  # Other messages of this type wait: their workers are to inherit it.
            if self._rehearsals[kind] >= REHEARSALS:
                return
            self._rehearsals[kind] += 1
            try:
                self.executor.rehearse(AppFirst(task.app, functools.partial(answer_or_raise, task)))
                self._rehearsals[kind] = REHEARSALS
            except PreloadError as exc:
                log.warning("workers inherit nothing of the rehearsal of %r: %s", kind, str(exc))

    def _task_of(self, pending: PendingMessage, node: _Node) -> MessageTask:
        seed = None
        if self._isolated:  # where threads share the generators it would only look reproducible
            seed = random.Random(f"{self._seed}/{pending.partition}/{node.messages}").getrandbits(32)
        node.messages += 1
        assert pending.content is not None
        return MessageTask(
            app=self.app,
            content=pending.content,
            metadata=pending.metadata,
            node_config=self._config_of(pending.partition),
            run_config=self._run_config,
            state=node.state,
            seed=seed,
            isolated=self._isolated,
        )

    def _config_of(self, partition: int) -> dict[str, Any]:
        given = self._node_config(partition) if callable(self._node_config) else self._node_config
        for key, value in dict(given).items():
            if not isinstance(key, str) or not isinstance(value, bool | int | float | str):
                raise NodeConfigError(
                    f"The node_config of partition {partition} has {key!r}: {value!r}; "
                    "Flower carries str, int, float and bool, under names."
                )
        return {PARTITION_ID_KEY: partition, NUM_PARTITIONS_KEY: self.num_nodes, **given}

    # ------------------------------------------------------------ back

    def _land(self, pending: PendingMessage, node: _Node, future: Future[Answer]) -> None:
        """Take an answer in, and send the node its next message. A callback: it must not raise."""
        try:
            answer, fatal = future.result(), None
        except BaseException as exc:
            answer, fatal = failed(exc), exc if isinstance(exc, InitializerError | PreloadError) else None
        with self._lock:
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
        """Settle what becomes of a message; False if that is settled already.

        An error is no failure, if `failed` says so, where nobody has waited for the reply.
        """
        with self._lock:
            if pending.answer is not None:
                return False
            pending.answer, pending.fatal = answer, fatal
            error = None if answer.error is None else answer.error[1]
            start = pending.round.start if pending.round is not None else 1
            record = TaskRecord(
                pending.kind, pending.partition, pending.server_round, error, start=start, **cost_of(future)
            )
            self.recorder.answered(record, pending.round, failed=failed and error is not None)
            self._advise(record, answer.filled)
        if failed and error is not None:
            log.warning("%s: %s", pending.where, str(error))
            log.debug("%s", answer.traceback)
        pending.landed(pending.id)
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
        """Answer a message with an error, and end its worker: nobody needs what that still does."""
        if not self._answer(pending, Answer(error=(code, reason)), failed=failed):
            return
        with self._lock:
            node = self._nodes[pending.node_id]
            if pending in node.waiting:
                node.waiting.remove(pending)
        if pending.future is not None:
            self.executor.end(pending.future)

    def _deliver(self, pending_messages: Iterable[PendingMessage]) -> list[Message]:
        """Make the replies, in an order that does not depend on who was first."""
        replies = []
        for pending in sorted(pending_messages, key=lambda pending: pending.partition):
            with self._lock:
                del self._pending[pending.id]
            if pending.fatal is not None:
                raise pending.fatal
            assert pending.answer is not None
            replies.append(make_reply(pending, pending.answer))
            pending.answer = Answer()  # what it held of shared memory is free for the next
        return replies


def _require_time_left(message: Message) -> None:
    metadata = message.metadata
    if metadata.reply_to_message_id or metadata.created_at + metadata.ttl <= time.time():
        raise ValueError(f"A message to node {metadata.dst_node_id} that cannot be sent: {metadata}")


def _await_landing(
    landed: "queue.SimpleQueue[str]", unanswered: dict[str, PendingMessage], until: float
) -> None:
    """Take what has landed off `unanswered`, until nothing is left or it is too late."""
    while unanswered:
        left = min(until - time.monotonic(), threading.TIMEOUT_MAX)
        try:
            unanswered.pop(landed.get(timeout=left) if left > 0 else landed.get_nowait(), None)
        except queue.Empty:
            return
