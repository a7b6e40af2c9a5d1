"""How a worker that waited runs a task: it says that it begins, then it answers, over a pipe of its own.

Before it begins nobody has run any of the task, which may be given to another. And since nobody else has the
pipe's writing end, its death ends the pipe: whoever waits hears of it even in the middle of an answer.
"""

from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from fedexec._processes.mp_context import end_process
from fedexec._processes.stopped import await_answer
from fedexec._worker.running import run

__all__ = ["BEGUN", "await_beginning", "receive", "serve"]

BEGUN = b""


def await_beginning(connection: Connection, process: BaseProcess) -> None:
    """Wait until a worker begins its task; EOFError or OSError if it ends before that.

    One that stays stopped is ended, so that another may have the task.
    """
    if not await_answer([connection, process.sentinel], process.pid):
        end_process(process)
    if receive(connection, process) != BEGUN:
        raise EOFError


def receive(connection: Connection, process: BaseProcess) -> bytes:
    """Wait for a message of a worker; EOFError or OSError if it ends without one."""
    ready = wait([connection, process.sentinel])
    if connection in ready or connection.poll():  # a message may lie there although its writer is gone
        return connection.recv_bytes()
    raise EOFError


def serve(connection: Connection, message: bytes) -> None:
    """Run one packed task, in the worker."""
    connection.send_bytes(BEGUN)
    connection.send_bytes(run(message))
