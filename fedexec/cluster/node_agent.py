"""The node agent: it runs the tasks of a caller on another machine, in an ordinary executor."""

import asyncio
import functools
import logging
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, ParamSpec, TypeVar

from fedexec._channel.initargs import PackedHook
from fedexec._channel.packed_calls import PackedCall, PackedReply
from fedexec._channel.pickling import Packed
from fedexec._system.available_resources import available_cores, total_bytes
from fedexec.cluster.engine import Blob
from fedexec.cluster.messages import (
    NodeOrder,
    NodeReply,
    NodeStatus,
    NodeTask,
    StaleAgentError,
    pack_error,
)
from fedexec.cluster.versions import versions
from fedexec.errors import WorkerDiedError
from fedexec.executor import Executor
from fedexec.interface import Capability, Hooks, Node, Task
from fedexec.settings import resolve

__all__ = ["NodeAgent"]

log = logging.getLogger("fedexec")
P = ParamSpec("P")
T = TypeVar("T")

OUTPUT_BYTES = 1 << 20  # the last bytes that tasks have written and that wait for the caller
ABANDON_SECONDS = 0.5  # how long ending the workers may take if the caller is gone
ENDED_TASKS = 10_000  # how many tasks are remembered that were to end before they had come


def _answering(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[tuple[T | None, bytes | None]]]:
    """Return the result of a method, or its pickled exception: engines wrap exceptions differently."""

    @functools.wraps(method)
    async def answer(*args: P.args, **kwargs: P.kwargs) -> tuple[T | None, bytes | None]:
        try:
            return await method(*args, **kwargs), None
        except Exception as exc:
            return None, pack_error(exc)

    return answer


class NodeAgent:
    """Runs tasks of one caller. The engine creates it in a process of its own, and calls it in an event loop.

    An engine may create it anew, for example after a crash. Then it knows no session and refuses all calls,
    so nothing runs twice. Each method returns a pair: its result, and a pickled exception.
    """

    def __init__(self) -> None:
        self._session: str | None = None
        self._has_ended = False
        self._is_abandoned = False
        self._executor: Executor | None = None
        self._order: NodeOrder | None = None
        self._base_path: tuple[str, ...] = ()
        self._futures: dict[int, tuple[Task, Future[Any]]] = {}  # by the caller's number of the task
        self._ended: deque[int] = deque(maxlen=ENDED_TASKS)
        self._contents: dict[int, memoryview] = {}
        self._records: deque[tuple[int, str]] = deque()
        self._output_lock = threading.Lock()
        self._output: deque[tuple[int, bytes]] = deque()
        self._answered: dict[int, float] = {}  # number of a sign of life -> when it was answered
        self._gives_up_at = float("inf")
        self._closed = threading.Event()

    @_answering
    async def open(self, order: NodeOrder) -> tuple[str, Node, Capability, NodeStatus]:
        """Make the executor; this may take as long as the preload and the warm-up.

        Parameters
        ----------
        order : NodeOrder

        Returns
        -------
        session : str
            First argument of all other methods.
        node : Node
        capabilities : Capability
            Those of the executor.
        status : NodeStatus
        """
        self._order = order
        self._base_path = order.surroundings.take_over()
        _Collector(self._records).start(order.log_level)
        executor = self._executor = await asyncio.to_thread(_make_executor, order)
        self._session = uuid.uuid4().hex
        self._gives_up_at = time.monotonic() + order.lease_seconds
        threading.Thread(target=self._watch_the_caller, name="fedexec-lease", daemon=True).start()
        node = Node(
            id=self._session,
            host=socket.gethostname(),
            slots=executor.settings.max_workers,
            cores=available_cores(),
            memory_bytes=total_bytes(),
            devices=tuple(device.name for device in executor.devices),
            versions=versions(),
            missing=tuple(entry for entry in order.surroundings.path if not os.path.exists(entry)),  # noqa: PTH110
        )
        return self._session, node, executor.capabilities, self._status(executor)

    @_answering
    async def beat(
        self, session: str, number: int, acknowledged: int, newest: int, alive: tuple[int, ...]
    ) -> NodeStatus:
        """Answer the caller's sign of life.

        The lease runs from the last answer that the caller is known to have got. So it ends before the caller
        gives the node up, even if only one direction of the network is cut.

        Parameters
        ----------
        session : str
        number : int
            Number of this sign of life.
        acknowledged : int
            Number of the last sign of life whose answer the caller has got.
        newest : int
            Number of the newest content that the caller had when it sent this.
        alive : tuple of int
            Numbers of the contents that the caller still has.

        Returns
        -------
        NodeStatus
        """
        if self._has_ended and session == self._session:
            return NodeStatus(slots=0)
        executor, order = self._of(session)
        if acknowledged in self._answered:
            self._gives_up_at = self._answered[acknowledged] + order.lease_seconds
            self._answered = {each: at for each, at in self._answered.items() if each >= acknowledged}
        self._answered[number] = time.monotonic()
        for each in list(self._contents):
            if each <= newest and each not in alive:
                del self._contents[each]
        return self._status(executor)

    @_answering
    async def keep(self, session: str, number: int, content: Blob) -> None:
        """Keep a content for the tasks that refer to it.

        Parameters
        ----------
        session : str
        number : int
        content : Blob
        """
        self._of(session)
        self._contents[number] = content.data

    @_answering
    async def run(self, session: str, task: NodeTask) -> NodeReply:
        """Run a task, and wait for its end.

        Parameters
        ----------
        session : str
        task : NodeTask

        Returns
        -------
        NodeReply
        """
        executor, _ = self._of(session)
        if task.id in self._ended:
            raise WorkerDiedError(None, None, task.kind)
        local = self._local(task)
        future = executor.submit_task(local)
        self._futures[task.id] = local, future
        done = asyncio.wrap_future(future)
        try:
            await asyncio.wait([done])
        finally:
            del self._futures[task.id]
        if self._is_abandoned:  # the caller has to learn that the node is lost, not how its workers ended
            await asyncio.Event().wait()
        if done.cancelled():
            raise WorkerDiedError(None, None, local.name)
        error = done.exception()
        reply = future.result() if error is None else None
        return NodeReply(
            reply=reply if isinstance(reply, PackedReply) else None,
            error=None if error is None else pack_error(error),
            status=self._status(executor),
        )

    @_answering
    async def end(self, session: str, task_id: int, number: int) -> None:
        """End a task: its worker gets a signal; if it waits, it does not begin.

        Parameters
        ----------
        session : str
        task_id : int
        number : int
            Number of the signal.
        """
        executor, _ = self._of(session)
        self._ended.append(task_id)
        if task_id in self._futures:
            executor.end(self._futures[task_id][1], number)

    @_answering
    async def rehearse(self, session: str, call: bytes, name: str) -> str | None:
        """Make a call whose effects in memory later workers inherit; see :meth:`fedexec.Executor.rehearse`.

        Parameters
        ----------
        session : str
        call : bytes
            The pickled function without parameters.
        name : str
            Name of the function.

        Returns
        -------
        str or None
            Why workers do not inherit the effects; None if they do.
        """
        executor, _ = self._of(session)
        return await asyncio.to_thread(executor.rehearse_call, PackedHook(call), name)

    @_answering
    async def close(self, session: str, at_once: bool) -> NodeStatus:
        """End the executor. All workers have ended when this returns.

        Parameters
        ----------
        session : str
        at_once : bool
            Whether to end also the workers that run tasks.

        Returns
        -------
        NodeStatus
            The last one.
        """
        if self._has_ended and session == self._session:
            return NodeStatus(slots=0)
        executor, _ = self._of(session)
        await asyncio.to_thread(executor.kill_workers if at_once else executor.shutdown)
        status = self._status(executor)
        self._forget()
        return status

    def abandon(self) -> None:
        """End all workers at once, and this process with them, because the caller is gone."""
        self._is_abandoned = True
        executor = self._executor
        self._forget()
        # If ending the executor takes longer, the kernel ends the workers when this process has ended.
        threading.Timer(ABANDON_SECONDS, os._exit, (1,)).start()
        if executor is not None:
            executor.kill_workers()
        os._exit(1)

    # ------------------------------------------------------------

    def _of(self, session: str) -> tuple[Executor, NodeOrder]:
        if session != self._session or self._executor is None or self._order is None:
            raise StaleAgentError("the node agent has ended its workers, or was restarted")
        return self._executor, self._order

    def _local(self, task: NodeTask) -> Task:
        """Return the task for the executor of this node."""
        buffers = [self._buffer(each) for each in task.buffers]
        path = None if task.path is None else (*task.path, *self._base_path)
        call = PackedCall(Packed(task.data, buffers, task.sources), task.kind, path)
        return Task(
            fn=call,
            args=(),
            kwargs={},
            timeout=task.timeout,
            tag=task.tag,
            seed=task.seed,
            needs=task.needs,
            pass_on=self._note,
        )

    def _buffer(self, described: bytes | tuple[int, int, int]) -> memoryview:
        if isinstance(described, bytes):
            return memoryview(described)
        number, offset, size = described
        return self._contents[number][offset : offset + size]

    def _note(self, stream: int, data: bytes) -> None:
        with self._output_lock:
            self._output.append((stream, data))
            while sum(len(data) for _, data in self._output) > OUTPUT_BYTES:
                self._output.popleft()

    def _take_output(self) -> tuple[tuple[int, bytes], ...]:
        with self._output_lock:
            taken = tuple(self._output)
            self._output.clear()
            return taken

    def _status(self, executor: Executor) -> NodeStatus:
        stats = executor.stats()
        return NodeStatus(
            slots=_slots(executor),
            pids={number: task.pid for number, (task, _) in self._futures.items() if task.pid is not None},
            output=self._take_output(),
            records=tuple(self._records.popleft() for _ in range(len(self._records))),
            restarts=stats.restarts,
            learning=stats.learning,
            footprints=executor.footprints(),
        )

    def _watch_the_caller(self) -> None:
        """End all workers if the caller is silent for too long; it then runs their tasks elsewhere."""
        while not self._closed.wait(min(1.0, max(0.05, self._gives_up_at - time.monotonic()))):
            if time.monotonic() >= self._gives_up_at:
                self.abandon()

    def _forget(self) -> None:
        self._has_ended, self._executor = True, None
        self._contents.clear()
        self._closed.set()


class _Collector(logging.Handler):
    """Collects what the executor logs, for the log of the caller."""

    def __init__(self, records: deque[tuple[int, str]]) -> None:
        super().__init__()
        self._records = records

    def start(self, level: int) -> None:
        """Collect from now on, and log nothing here."""
        log.handlers[:] = [self]
        log.propagate = False
        log.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        """Collect one message."""
        self._records.append((record.levelno, record.getMessage()))


def _make_executor(order: NodeOrder) -> Executor:
    return Executor(resolve(order.settings, environ={}), Hooks(order.initializer, (), order.warmup))


def _slots(executor: Executor) -> int:
    """Return how many tasks a node can run at once now, as far as it knows.

    If memory decides, that is known only from the tasks themselves: as long as none waits, there may be room
    for as many more as there are cores.
    """
    most = executor.settings.max_workers
    if not executor.settings.auto:
        return most
    stats = executor.stats()
    more = 0 if stats.queued else available_cores()
    return max(1, min(most, stats.running + more))
