"""A message between its push and its pull, and the reply that is made of what became of it."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from flwr.app import Error, Message, Metadata, RecordDict

from fedexec.errors import TaskTimeoutError, WorkerDiedError, WorkerMemoryError
from fedexec.flower.flower_internals import ErrorCode, arrived, stamp
from fedexec.flower.history import Round
from fedexec.flower.record_packing import Packed, unpack
from fedexec.flower.simulation.client_app import Answer

__all__ = ["PendingMessage", "failed", "make_reply"]


@dataclass(slots=True, eq=False)
class PendingMessage:
    """One message, and what is known of it.

    Its reply may never be pulled: once it is sent it keeps nothing of its content.
    """

    metadata: Metadata
    content: Packed | None  # until it is sent
    partition: int  # -1: there is no such node
    server_round: int | None
    expires: float  # by time.monotonic
    landed: Callable[[str], object]  # called with its id when it has an answer
    round: Round | None = None  # the recorder's
    future: Future[Answer] | None = None
    answer: Answer | None = None
    fatal: BaseException | None = None  # no message can be answered any more

    @property
    def id(self) -> str:
        """The message's own."""
        return self.metadata.message_id

    @property
    def kind(self) -> str:
        """The message's type: "train", "evaluate", "query", or one of these and an action."""
        return self.metadata.message_type

    @property
    def node_id(self) -> int:
        """Where it goes."""
        return self.metadata.dst_node_id

    @property
    def where(self) -> str:
        """Where it goes, for people."""
        return f"node {self.node_id} (partition {self.partition})"


def failed(error: BaseException) -> Answer:
    """Say with Flower's codes why a task gave no answer."""
    crashed = isinstance(error, WorkerDiedError | TaskTimeoutError | WorkerMemoryError)
    code = ErrorCode.CLIENT_APP_CRASHED if crashed else ErrorCode.UNKNOWN
    return Answer(error=(code, " ".join(f"{type(error).__name__}: {error}".split())))


def make_reply(pending: PendingMessage, answer: Answer) -> Message:
    """Return the ClientApp's own reply, or an error that names the node."""
    reply: Message
    if answer.reply is not None:
        reply = unpack(answer.reply)
    else:
        code, reason = answer.error or (ErrorCode.UNKNOWN, "no answer")
        request = arrived(RecordDict(), pending.metadata)
        reply = Message(Error(code, f"{pending.where}: {reason}"), reply_to=request)
    stamp(reply)
    return reply
