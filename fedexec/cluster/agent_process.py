"""A node agent in a process of its own, for engines whose processes run other work too.

So the node agent may change its working directory and its environment, a fault in it harms nothing else, and
the memory that it needs is not counted as that of the engine.
"""

import asyncio
import contextlib
import itertools
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from fedexec.cluster.messages import NodeOrder, StaleAgentError, pack_error
from fedexec.cluster.node_agent import NodeAgent

__all__ = ["AgentProcess"]

LEAVE_SECONDS = 2.0  # how long the process may take to end after its connection was closed
_NUMBER = struct.Struct("<Q")


def _passed_on(method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
    """Return a method of AgentProcess that calls the node agent's method of this name."""

    async def call(self: "AgentProcess", *args: Any) -> Any:
        return await self._call(method, *args)

    call.__doc__ = f"See :meth:`NodeAgent.{method}`."
    return call


class AgentProcess:
    """Starts a process with a :class:`~fedexec.cluster.NodeAgent`, whose methods it has too.

    The process ends when :meth:`hang_up` is called, or when the process of this object ends.
    """

    def __init__(self) -> None:
        self._connection: _Connection | None = None

    async def open(self, order: NodeOrder) -> Any:
        """Start the process and open the node agent; see :meth:`NodeAgent.open`."""
        ours, theirs = socket.socketpair()
        with theirs:
            number = theirs.fileno()
            path = [entry for entry in sys.path if isinstance(entry, str)]  # the engine may have extended it
            command = [sys.executable, "-m", __name__, str(number), *path]
            process = subprocess.Popen(command, pass_fds=[number], stdin=subprocess.DEVNULL)
        self._connection = await _Connection.to(ours, process)
        answer = await self._call("open", order)
        _, error = answer
        if error is not None:
            await self._connection.end()
        return answer

    beat = _passed_on("beat")
    keep = _passed_on("keep")
    run = _passed_on("run")
    end = _passed_on("end")
    rehearse = _passed_on("rehearse")

    async def close(self, *args: Any) -> Any:
        """Close the node agent and end its process; see :meth:`NodeAgent.close`."""
        answer = await self._call("close", *args)
        if self._connection is not None:
            await self._connection.end()
        return answer

    def hang_up(self) -> None:
        """End the process at once. Any thread may call this."""
        if self._connection is not None:
            self._connection.hang_up()

    async def _call(self, method: str, *args: Any) -> Any:
        try:
            if self._connection is None:
                raise StaleAgentError("the node agent was restarted")
            return await self._connection.call(method, args)
        except (StaleAgentError, ConnectionError) as exc:
            # The connection keeps the error, whose traceback would keep the frames that have views of the
            # task's buffers, and they the connection. CPython can crash when it collects such a circle.
            exc.__traceback__ = None
            return None, pack_error(exc)


class _Connection:
    """The engine's end of the connection. The task that reads refers to it, and not to the AgentProcess."""

    def __init__(
        self, ours: socket.socket, writer: asyncio.StreamWriter, process: "subprocess.Popen[bytes]"
    ) -> None:
        self._socket = ours
        self._process = process
        self._writer = writer
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._has_ended = False
        self._reading: asyncio.Task[None] | None = None  # the event loop has only a weak reference

    @classmethod
    async def to(cls, ours: socket.socket, process: "subprocess.Popen[bytes]") -> "_Connection":
        reader, writer = await asyncio.open_connection(sock=ours)
        connection = cls(ours, writer, process)
        connection._reading = asyncio.ensure_future(connection._read(reader))
        return connection

    async def call(self, method: str, args: tuple[Any, ...]) -> Any:
        if self._has_ended:
            raise ConnectionError("the process of the node agent has ended")
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            await _send(self._writer, (number, method, args))
            return await answer
        finally:
            del self._answers[number]
            if answer.done() and not answer.cancelled():
                answer.exception()  # nobody else looks at it if sending has failed

    def hang_up(self) -> None:
        """Have the process end. Any thread may call this."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    async def end(self) -> None:
        """Have the process end, and wait until it has."""
        self.hang_up()
        if self._reading is not None:
            await self._reading

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                number, result = await _receive(reader)
                if number in self._answers and not self._answers[number].done():
                    self._answers[number].set_result(result)
        except (EOFError, OSError):
            self._has_ended = True
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(ConnectionError("the process of the node agent has ended"))
            self._writer.close()
            await asyncio.to_thread(self._reap)

    def _reap(self) -> None:
        """Wait until the process has ended; kill it if it does not end by itself, because it is stopped."""
        try:
            self._process.wait(LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


async def _send(writer: asyncio.StreamWriter, message: object) -> None:
    """Send the number of parts, their sizes in bytes, and the parts: a pickle, and the buffers beside it."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
    parts = [memoryview(data), *(buffer.raw() for buffer in buffers)]
    sizes = b"".join(_NUMBER.pack(size) for size in [len(parts), *(part.nbytes for part in parts)])
    writer.writelines([sizes, *parts])
    await writer.drain()


async def _receive(reader: asyncio.StreamReader) -> Any:
    number = await _read_number(reader)
    sizes = [await _read_number(reader) for _ in range(number)]
    data, *buffers = [await reader.readexactly(size) for size in sizes]
    return pickle.loads(data, buffers=buffers)


async def _read_number(reader: asyncio.StreamReader) -> int:
    number: int = _NUMBER.unpack(await reader.readexactly(_NUMBER.size))[0]
    return number


async def _serve(fd: int) -> None:
    """Serve a node agent in this process, until the other end hangs up."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))
    agent = NodeAgent()
    calls: set[asyncio.Task[None]] = set()

    async def answer(number: int, method: str, args: tuple[Any, ...]) -> None:
        await _send(writer, (number, await getattr(agent, method)(*args)))

    try:
        while True:
            call = asyncio.ensure_future(answer(*await _receive(reader)))
            calls.add(call)
            call.add_done_callback(calls.discard)
    except (EOFError, OSError):  # IncompleteReadError is an EOFError
        agent.abandon()


if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]
    asyncio.run(_serve(int(sys.argv[1])))
