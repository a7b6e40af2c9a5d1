"""``process``: one :class:`multiprocessing.Process` per task, whose result goes into a Manager's dict.

This is the method of the tutorial that fedexec grew from, without its weaknesses. An exception arrives as
that exception. A worker that dies raises :class:`~fedexec.errors.WorkerDiedError` instead of a ``KeyError``.
One Manager serves all tasks, where the tutorial starts one per task, and it ends with the executor or with
the caller.
"""

import contextlib
import functools
import os
import secrets
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import MutableMapping
from multiprocessing import managers, util
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from multiprocessing.managers import SyncManager
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from fedexec.backend import (
    Capability,
    Hooks,
    IsolatingBackend,
    Outcome,
    Settings,
    Task,
    WorkerContext,
    WorkerDiedError,
    WorkerProcess,
    WorkerSetup,
    await_answer,
    await_reader,
    end_process,
    end_with_caller,
    exit_code,
    run,
    setup,
)

__all__ = ["ProcessBackend"]

_MANAGER_GONE = (ConnectionError, EOFError, FileNotFoundError)
_SOCKET, _PID = "socket", "pid"
_LONGEST_PATH = 90  # bytes of a directory's path, because a socket's path may have 103 bytes on macOS
_AFTER_THE_SOCKET = -100  # exit priority; multiprocessing removes a Manager's socket at priority 0
_MANAGERS = 5  # how many Managers in a row may be killed as soon as they start


class ProcessBackend(IsolatingBackend):
    """Starts a process for each task, waits for its end, and reads its result from the dict.

    Parameters
    ----------
    settings : Settings
    hooks : Hooks
    """

    capabilities = (
        Capability.ISOLATED
        | Capability.FRESH_PROCESS
        | Capability.SURVIVES_DEATH
        | Capability.KILLS_ONE
        | Capability.SHARES_MEMORY
    )
    descriptors_per_worker = 8

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        # As in the tutorial, arrays go through the Manager, unless the user has asked for shared memory.
        is_chosen = settings.sources.get("shared_memory", "default") != "default"
        super().__init__(settings, hooks, shared_memory=is_chosen and settings.shared_memory)
        self._lock = threading.Lock()  # guards the Manager
        self._manager: _Manager | None = None

    def run(self, task: Task) -> Outcome:
        """Run one task in a process of its own.

        Parameters
        ----------
        task : Task

        Returns
        -------
        Outcome
        """
        return self.channel.deliver(task, functools.partial(self._call, task))

    def _call(self, task: Task, message: bytes) -> bytes:
        return_dict = self._return_dict(task)
        process = self.context.Process(target=_work, args=(self.worker_setup, message, return_dict))
        process.start()
        with self.running(task, process):
            process.join()
        pid, exitcode = process.pid, exit_code(process)
        process.close()
        gone = None
        try:
            reply = return_dict.pop("reply", None)
            if reply is not None:
                return reply
        except _MANAGER_GONE as exc:
            # The traceback's frames refer to this one and would form a reference cycle.
            gone = exc.with_traceback(None)
        try:
            died = WorkerDiedError(pid, exitcode, task.name)
            if gone is not None:
                died.add_note("The Manager that held its result had died.")
            raise died from gone
        finally:
            del died  # avoids a reference cycle

    def shutdown(self) -> None:
        """End the Manager and the template."""
        with self._lock:
            if self._manager is not None:
                self._manager.end()
                self._manager = None
        super().shutdown()

    def _return_dict(self, task: Task) -> MutableMapping[str, bytes]:
        with self._lock:
            for _ in range(_MANAGERS):
                try:
                    if self._manager is None:
                        self._manager = _Manager(self.context)
                    if self._manager.is_alive():
                        return self._manager.dict()
                except _MANAGER_GONE:
                    pass
                if self._manager is not None:
                    self._manager.end()
                    self._manager = None
        died = WorkerDiedError(None, None, task.name)
        died.add_note("The Manager for its result died again and again.")
        raise died


class _StrangerError(ConnectionError):
    """The process at the other end of a connection belongs to another user."""


class _StoppedError(ConnectionError):
    """The Manager is stopped and does not answer."""


class _PatientConnection(Connection):
    """A connection to a Manager that gives up when the Manager stays stopped."""

    @classmethod
    def of(cls, connection: Connection) -> "_PatientConnection":
        """Return a connection of this class that replaces another connection.

        Parameters
        ----------
        connection : Connection
            Closed afterwards.

        Returns
        -------
        _PatientConnection
        """
        replacement = cls(os.dup(connection.fileno()))
        connection.close()
        return replacement

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
        """Send a message of bytes.

        Parameters
        ----------
        buf : bytes-like
        offset : int
        size : int, optional
            As for :meth:`multiprocessing.connection.Connection.send_bytes`.
        """
        pid, _ = _peer(self)
        with await_reader(pid, len(buf)):
            super().send_bytes(buf, offset, size)

    def send(self, obj: Any) -> None:
        """Send a pickled object.

        Parameters
        ----------
        obj : object
        """
        self.send_bytes(ForkingPickler.dumps(obj))

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Receive a message as bytes.

        Parameters
        ----------
        maxlength : int, optional
            The highest accepted number of bytes.

        Returns
        -------
        bytes
        """
        self._await_message()
        return super().recv_bytes(maxlength)

    def recv(self) -> Any:
        """Receive a pickled object."""
        self._await_message()
        return super().recv()

    def _await_message(self) -> None:
        if not await_answer([self], _peer(self)[0]):
            raise _StoppedError("the Manager is stopped and does not answer")


def _connect(address: str, authkey: bytes | None = None) -> Connection:
    """Connect to the Manager, and exchange no data with a process of another user.

    When the Manager has died, the name of its socket is free, and a process of any user can take it.
    """
    connection = _PatientConnection.of(Client(address))
    try:
        if not _is_of_this_user(connection):
            raise _StrangerError("another user answers at the Manager's address")
        if authkey is not None:
            answer_challenge(connection, authkey)
            deliver_challenge(connection, authkey)
    except BaseException:
        connection.close()
        raise
    return connection


# Proxies know under this name the pair of functions with which they talk to their Manager.
_SERIALIZER = "fedexec"
_listener_client: dict[str, Any] = managers.listener_client  # type: ignore[attr-defined]
_listener_client[_SERIALIZER] = (Listener, _connect)


class _Server(managers.Server):
    """The server in the Manager's process: it rejects other users, even if they know the key."""

    def handle_request(self, connection: Connection) -> None:
        """Answer one request, unless another user sends it.

        Parameters
        ----------
        connection : Connection
        """
        if _is_of_this_user(connection):
            super().handle_request(connection)
        else:
            connection.close()


def _is_of_this_user(connection: Connection) -> bool:
    return _peer(connection)[1] == os.geteuid()


def _peer(connection: Connection) -> tuple[int | None, int]:
    """Return pid and user id of the process at the other end; None and this user if that is unknown."""
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        if not hasattr(socket, "SO_PEERCRED"):  # The key and the socket's private directory have to suffice.
            return _pid_beside(peer.getpeername()), os.geteuid()
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


def _pid_beside(address: str) -> int | None:
    """Return what the Manager has noted beside its socket; None if it has ended, or for its own end."""
    try:
        return int(Path(address).with_name(_PID).read_text()) if address else None
    except (OSError, ValueError):
        return None


class _Manager(SyncManager):
    """A Manager that leaves no file behind, even if it is killed, and never outlives the caller."""

    _Server = _Server

    def __init__(self, context: WorkerContext) -> None:
        # An abstract socket has no name in the file system, so it need not be removed. Only Linux has them.
        self._directory = None if sys.platform == "linux" else _new_directory()
        abstract = f"\0fedexec-{secrets.token_hex(16)}"
        address = abstract if self._directory is None else str(self._directory / _SOCKET)
        super().__init__(address=address, serializer=_SERIALIZER, ctx=context)
        self._process: WorkerProcess | None = None
        try:
            self.start(_prepare_manager, (self._directory,))
        except BaseException:
            self._forget()
            raise

    def is_alive(self) -> bool:
        """Return whether the Manager's process runs."""
        return self._process is not None and self._process.is_alive()

    def end(self) -> None:
        """End the Manager's process and release it."""
        self.shutdown()
        self._forget()

    def _forget(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.pid is not None:
            end_process(process)
            process.join()
            process.close()
        if self._directory is not None:  # The directory still exists if the process was killed.
            _remove(self._directory)


def _prepare_manager(directory: Path | None) -> None:
    os.setpgid(0, 0)  # Ctrl+C is for the caller alone.
    if directory is None:
        end_with_caller()
    else:
        directory.mkdir(0o700)
        (directory / _PID).write_text(str(os.getpid()))
        util.Finalize(None, _remove, (directory,), exitpriority=_AFTER_THE_SOCKET)
        end_with_caller(functools.partial(_remove, directory))


def _new_directory() -> Path:
    """Return an unused name, which cannot be guessed, for the private directory of a Manager's socket."""
    name = f"fedexec-{secrets.token_hex(8)}"
    path = Path(tempfile.gettempdir(), name)
    return path if len(os.fsencode(path)) <= _LONGEST_PATH else Path("/tmp", name)


def _remove(directory: Path) -> None:
    """Remove a Manager's socket, its note and their directory if they exist, and nothing else."""
    for _ in range(2):  # The Manager's main thread may create the socket just after the first attempt.
        for name in (_SOCKET, _PID):
            with contextlib.suppress(OSError):
                (directory / name).unlink()
        with contextlib.suppress(OSError):
            directory.rmdir()


def _work(worker_setup: WorkerSetup, message: bytes, return_dict: MutableMapping[str, bytes]) -> None:
    """Run in the worker: set it up, run the task, and put the reply into the dict."""
    setup(worker_setup)
    try:
        return_dict["reply"] = run(message)
    except _MANAGER_GONE:
        os._exit(1)  # The caller reports what has happened.
