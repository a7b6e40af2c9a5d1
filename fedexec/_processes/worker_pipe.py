"""How a waiting worker runs a task: it reports the beginning, then answers, over a pipe of its own.

Before the report nothing of the task has run, so another worker may get the task. The worker is the only
process that has the pipe's writing end, so the pipe ends when the worker dies, even in the middle of an
answer, and the caller notices.
"""

from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from fedexec._processes.mp_context import end_process
from fedexec._processes.stopped_processes import await_answer
from fedexec._worker.running import run

__all__ = ["BEGUN", "await_beginning", "receive", "serve"]

BEGUN = b""


def await_beginning(connection: Connection, process: BaseProcess) -> None:
    """Wait until a worker begins its task.

    A worker that stays stopped is ended, so that another worker can get the task.

    Parameters
    ----------
    connection : Connection
        The caller's end of the worker's pipe.
    process : BaseProcess
        The worker.

    Raises
    ------
    EOFError, OSError
        The worker has ended before it began.
    """
    if not await_answer([connection, process.sentinel], process.pid):
        end_process(process)
    if receive(connection, process) != BEGUN:
        raise EOFError


def receive(connection: Connection, process: BaseProcess) -> bytes:
    """Wait for a worker's message.

    Parameters
    ----------
    connection : Connection
        The caller's end of the worker's pipe.
    process : BaseProcess
        The worker.

    Returns
    -------
    bytes

    Raises
    ------
    EOFError, OSError
        The worker has ended without a message.
    """
    ready = wait([connection, process.sentinel])
    if connection in ready or connection.poll():  # A message may be there although its writer is gone.
        return connection.recv_bytes()
    raise EOFError


def serve(connection: Connection, message: bytes) -> None:
    """Run one packed task, in the worker.

    Parameters
    ----------
    connection : Connection
        The worker's end of its pipe.
    message : bytes
        The packed task.
    """
    connection.send_bytes(BEGUN)
    connection.send_bytes(run(message))
