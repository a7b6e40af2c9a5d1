"""The caller's view of one node: its agent, its slots, the tasks that run there, and whether it is alive."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from fedexec.cluster.contents import Content
from fedexec.cluster.engine import Agent, Place
from fedexec.cluster.messages import NodeOrder, NodeReply, NodeStatus, NodeTask, StaleAgentError, unpack_error
from fedexec.interface import Capability, Node, Task
from fedexec.usage import node_name

__all__ = ["LostError", "RemoteNode"]

log = logging.getLogger("fedexec")


class LostError(Exception):
    """The node was lost; the text is the reason."""


class RemoteNode:
    """One node.

    Parameters
    ----------
    place : Place
    agent : Agent
    timeout : float
        After so many seconds without an answer the node is lost.
    noticed : callable
        ``noticed(node, status)`` is called with each status, and with None when the node is lost.

    Attributes
    ----------
    lost : str or None
        Why the node was lost; None as long as it is not.
    status : NodeStatus
        The last one.
    running : dict of int to Task
        The tasks that were given to the node, by id. The backend guards it.
    """

    def __init__(
        self,
        place: Place,
        agent: Agent,
        timeout: float,
        noticed: "Callable[[RemoteNode, NodeStatus | None], object]",
    ) -> None:
        self.place = place
        self.lost: str | None = None
        self.status = NodeStatus(slots=0)
        self.running: dict[int, Task] = {}
        self.description: Node | None = None
        self.capabilities = Capability(0)
        self._agent = agent
        self._timeout = timeout
        self._noticed = noticed
        self._session = ""
        self._lock = threading.Lock()  # guards everything below
        self._calls: set[Future[Any]] = set()
        self._kept: dict[int, Future[Any]] = {}  # number of a content -> the call that brings it to the node
        self._beats = 0  # number of the last sign of life
        self._acknowledged = -1  # number of the last one that was answered
        self._answered_at = time.monotonic()
        self._beat: Future[Any] | None = None
        self._discarded = threading.Event()

    @property
    def name(self) -> str:
        """Name of the node for messages."""
        host = self.place.host if self.description is None else self.description.host
        return node_name(host, self.place.id)

    @property
    def free_slots(self) -> int:
        """How many more tasks the node can run now."""
        return 0 if self.lost is not None else self.status.slots - len(self.running)

    def open(self, order: NodeOrder, seconds: float) -> Node:
        """Have the node agent make its executor, and wait until it has.

        Parameters
        ----------
        order : NodeOrder
        seconds : float
            How long that may take.

        Returns
        -------
        Node

        Raises
        ------
        Exception
            What the executor raises, such as PreloadError.
        LostError
            The node agent is gone, or does not answer.
        """
        opening = self._call("open", order)
        try:
            self._session, self.description, self.capabilities, status = opening.result(seconds)
        except TimeoutError:
            if opening.done():  # the node agent itself has said so
                raise
            raise LostError(f"its node agent was not ready after {seconds:.0f} s") from None
        self._answered_at = time.monotonic()
        self._note(status)
        return self.description

    def run(self, task: NodeTask, contents: Sequence[Content]) -> NodeReply:
        """Run a task on the node, and wait for its end.

        Parameters
        ----------
        task : NodeTask
        contents : sequence of Content
            What holds the large buffers of the task.

        Returns
        -------
        NodeReply

        Raises
        ------
        LostError
            The node was lost.
        """
        for brought in [self._keep(content) for content in contents]:
            brought.result()
        reply: NodeReply = self.call("run", task).result()
        self._note(reply.status)
        return reply

    def call(self, method: str, *args: Any) -> "Future[Any]":
        """Call a method of the node agent that takes the session as its first argument.

        Parameters
        ----------
        method : str
        args
            The other arguments.

        Returns
        -------
        Future
            Has a LostError if the node is lost before there is an answer.
        """
        return self._call(method, self._session, *args)

    def send_sign_of_life(self, newest: int, alive: tuple[int, ...]) -> None:
        """Send a sign of life if the last one was answered; if it was not for too long, the node is lost.

        Parameters
        ----------
        newest : int
            Number of the newest content.
        alive : tuple of int
            Numbers of all contents.
        """
        silent = time.monotonic() - self._answered_at
        if self._beat is not None and not self._beat.done():
            if silent > self._timeout:
                self.lose(f"it has not answered for {silent:.1f} s")
            return
        with self._lock:
            for number in [each for each in self._kept if each <= newest and each not in alive]:
                del self._kept[number]
            self._beats += 1
            number = self._beats
        beat = self._beat = self.call("beat", number, self._acknowledged, newest, alive)
        beat.add_done_callback(lambda future: self._answered(number, future))

    def lose(self, reason: str) -> None:
        """Give the node up: all calls that wait fail.

        Parameters
        ----------
        reason : str
        """
        with self._lock:
            if self.lost is not None:
                return
            self.lost = reason
            calls, self._calls = self._calls, set()
        self._noticed(self, None)
        for future in calls:
            _set_error(future, LostError(reason))
        # Not here: this may be a callback of the engine, which then waits for itself.
        threading.Thread(target=self._discard, name="fedexec-discard", daemon=True).start()

    def end(self) -> None:
        """End the node agent, and wait until it has ended; another thread may have begun to end it."""
        self.lose("the executor was shut down")
        self._discarded.wait()

    # ------------------------------------------------------------

    def _discard(self) -> None:
        try:
            self._agent.discard()
        finally:
            self._discarded.set()

    def _call(self, method: str, *args: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        with self._lock:
            if self.lost is not None:
                future.set_exception(LostError(self.lost))
                return future
            self._calls.add(future)
        try:
            self._agent.call(method, *args).add_done_callback(lambda done: self._pass_on(done, future))
        except ConnectionError as exc:
            self.lose(str(exc))
        return future

    def _pass_on(self, done: "Future[Any]", future: "Future[Any]") -> None:
        with self._lock:
            self._calls.discard(future)
        try:
            value, error = done.result()
            if error is not None:
                raise unpack_error(error)
        except (ConnectionError, StaleAgentError) as exc:
            self.lose(str(exc))
            _set_error(future, LostError(str(exc)))
        except BaseException as exc:
            _set_error(future, exc)
        else:
            with contextlib.suppress(InvalidStateError):  # the node was lost in the same moment
                future.set_result(value)

    def _keep(self, content: Content) -> "Future[Any]":
        with self._lock:
            waiting = self._kept.get(content.number)
            if waiting is None:
                bringing: Future[Any] = Future()
                self._kept[content.number] = bringing
        if waiting is not None:
            return waiting
        brought = self.call("keep", content.number, content.handle)
        brought.add_done_callback(lambda done: _copy(done, bringing))
        return bringing

    def _answered(self, number: int, future: "Future[Any]") -> None:
        if future.exception() is None:
            self._acknowledged, self._answered_at = number, time.monotonic()
            self._note(future.result())

    def _note(self, status: NodeStatus) -> None:
        self.status = status
        self._noticed(self, status)


def _set_error(future: "Future[Any]", error: BaseException) -> None:
    with contextlib.suppress(InvalidStateError):  # the answer has come in the same moment
        future.set_exception(error)


def _copy(source: "Future[Any]", target: "Future[Any]") -> None:
    error = source.exception()
    if error is None:
        target.set_result(source.result())
    else:
        target.set_exception(error)
