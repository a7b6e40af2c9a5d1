"""A message between its push and its pull, and the reply that is made from its outcome."""

import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from flwr.app import Error, Message, Metadata, RecordDict

from fedexec._system.error_text import one_line
from fedexec.errors import TaskTimeoutError, WorkerDiedError, WorkerMemoryError
from fedexec.flower.flower_internals import ErrorCode, arrived, stamp
from fedexec.flower.history import Round
from fedexec.flower.record_packing import Packed, unpack
from fedexec.flower.simulation.client_app import Answer
from fedexec.flower.simulation.run_recorder import server_round_of

__all__ = [
    "PendingMessage",
    "await_answers",
    "error_answer",
    "make_pending",
    "make_reply",
    "require_time_left",
]


@dataclass(slots=True, eq=False)
class PendingMessage:
    """One message and what is known of it.

    The content is dropped when the message is sent, because the reply may never be pulled.

    Attributes
    ----------
    metadata : Metadata
    content : Packed or None
        None once the message is sent.
    partition : int
        -1 if the node does not exist.
    server_round : int or None
    expires : float
        Time of :func:`time.monotonic` at which the message's ``ttl`` is over.
    on_answer : callable
        ``on_answer(id)``, called when the message has an answer.
    round : Round or None
        The recorder's round.
    future : Future or None
    answer : Answer or None
    fatal : BaseException or None
        Error after which no message can be answered.
    """

    metadata: Metadata
    content: Packed | None
    partition: int
    server_round: int | None
    expires: float
    on_answer: Callable[[str], object]
    round: Round | None = None
    future: Future[Answer] | None = None
    answer: Answer | None = None
    fatal: BaseException | None = None

    @property
    def id(self) -> str:
        """The message's id."""
        return self.metadata.message_id

    @property
    def kind(self) -> str:
        """The message's type: "train", "evaluate" or "query", possibly followed by an action."""
        return self.metadata.message_type

    @property
    def node_id(self) -> int:
        """The id of the node that gets the message."""
        return self.metadata.dst_node_id

    @property
    def where(self) -> str:
        """The node that gets the message, for people."""
        return f"node {self.node_id} (partition {self.partition})"


def error_answer(error: BaseException) -> Answer:
    """Express in Flower's error codes why a task gave no answer.

    Parameters
    ----------
    error : BaseException

    Returns
    -------
    Answer
    """
    crashed = isinstance(error, WorkerDiedError | TaskTimeoutError | WorkerMemoryError)
    code = ErrorCode.CLIENT_APP_CRASHED if crashed else ErrorCode.UNKNOWN
    return Answer(error=(code, one_line(error)))


def make_reply(pending: PendingMessage, answer: Answer) -> Message:
    """Return the ClientApp's own reply, or an error that names the node.

    Parameters
    ----------
    pending : PendingMessage
    answer : Answer

    Returns
    -------
    Message
    """
    reply: Message
    if answer.reply is not None:
        reply = unpack(answer.reply)
    else:
        code, reason = answer.error or (ErrorCode.UNKNOWN, "no answer")
        request = arrived(RecordDict(), pending.metadata)
        reply = Message(Error(code, f"{pending.where}: {reason}"), reply_to=request)
    stamp(reply)
    return reply


def await_answers(
    answered_ids: "queue.SimpleQueue[str]", unanswered: dict[str, PendingMessage], until: float
) -> None:
    """Remove answered messages from `unanswered`, until none is left or the time is over.

    Parameters
    ----------
    answered_ids : queue.SimpleQueue of str
        Ids of the messages that have an answer.
    unanswered : dict of str to PendingMessage
        Id -> message.
    until : float
        Time of :func:`time.monotonic`.
    """
    while unanswered:
        left = min(until - time.monotonic(), threading.TIMEOUT_MAX)
        try:
            unanswered.pop(answered_ids.get(timeout=left) if left > 0 else answered_ids.get_nowait(), None)
        except queue.Empty:
            return


def make_pending(
    message: Message, content: Packed, partitions: Mapping[int, int], on_answer: Callable[[str], object]
) -> PendingMessage:
    """Give a message its id, and note when its reply is not waited for any more.

    Parameters
    ----------
    message : Message
    content : Packed
        The message's content.
    partitions : mapping of int to int
        The partition of each node, by its id.
    on_answer : callable

    Returns
    -------
    PendingMessage
    """
    metadata = message.metadata
    left = metadata.created_at + metadata.ttl - time.time()
    stamp(message)
    expires = time.monotonic() + left
    partition = partitions.get(metadata.dst_node_id, -1)
    return PendingMessage(metadata, content, partition, server_round_of(message), expires, on_answer)


def require_time_left(message: Message) -> None:
    """Check that a message can be sent.

    Parameters
    ----------
    message : Message

    Raises
    ------
    ValueError
        It is a reply, or its ``ttl`` is over.
    """
    metadata = message.metadata
    if metadata.reply_to_message_id or metadata.created_at + metadata.ttl <= time.time():
        raise ValueError(f"A message to node {metadata.dst_node_id} cannot be sent: {metadata}")
