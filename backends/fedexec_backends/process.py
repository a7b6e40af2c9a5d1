"""``process``: one raw :class:`multiprocessing.Process` per task, its result in a Manager's dict.

The method of the tutorial this project grew from, with its failures mended: an exception arrives as that
exception, a worker that dies as :class:`~fedexec.errors.WorkerDiedError` instead of a ``KeyError``, and the
Manager (one for all tasks, where the tutorial starts one for each) ends with the executor or with the caller.
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
_SOCKET = "socket"
_LONGEST_PATH = 90  # bytes of a directory's path: the socket's path may have 103 on macOS
_AFTER_THE_SOCKET = -100  # multiprocessing removes what a Manager listens to at priority 0
_MANAGERS = 5  # so many may be killed as soon as they start, one after another


class ProcessBackend(IsolatingBackend):
    """Starts a process, waits for its end, reads what it left in the dict."""

    capabilities = (
        Capability.ISOLATED
        | Capability.FRESH_PROCESS
        | Capability.SURVIVES_DEATH
        | Capability.KILLS_ONE
        | Capability.SHARES_MEMORY
    )
    descriptors_per_worker = 8

    def __init__(self, settings: Settings, hooks: Hooks) -> None:
        # Everything through the Manager, as the tutorial has it, unless asked otherwise.
        asked = settings.sources.get("shared_memory", "default") != "default"
        super().__init__(settings, hooks, shared_memory=asked and settings.shared_memory)
        self._lock = threading.Lock()  # guards the Manager
        self._manager: _Manager | None = None

    def run(self, task: Task) -> Outcome:
        """Run one task in one process."""
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
            gone = exc.with_traceback(None)  # its frames hold this one: no cycle
        try:
            died = WorkerDiedError(pid, exitcode, task.name)
            if gone is not None:
                died.add_note("The Manager that held its result had died.")
            raise died from gone
        finally:
            del died  # no cycle

    def shutdown(self) -> None:
        """End Manager and template."""
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
    """A connection to a Manager that does not wait for ever for one that is stopped."""

    @classmethod
    def of(cls, connection: Connection) -> "_PatientConnection":
        """Take a connection over."""
        taken = cls(os.dup(connection.fileno()))
        connection.close()
        return taken

    def send_bytes(self, buf: Any, offset: int = 0, size: int | None = None) -> None:
        """Send a message of bytes."""
        pid, _ = _peer(self)
        with await_reader(pid, len(buf)):
            super().send_bytes(buf, offset, size)

    def send(self, obj: Any) -> None:
        """Send an object."""
        self.send_bytes(ForkingPickler.dumps(obj))

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        """Receive a message as bytes."""
        self._await_message()
        return super().recv_bytes(maxlength)

    def recv(self) -> Any:
        """Receive an object."""
        self._await_message()
        return super().recv()

    def _await_message(self) -> None:
        if not await_answer([self], _peer(self)[0]):
            raise _StoppedError("the Manager is stopped and does not answer")


def _connect(address: str, authkey: bytes | None = None) -> Connection:
    """Connect to the Manager; nothing is read from, or told to, a process of another user.

    The name of its socket is free when the Manager has died, and anybody may take it.
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


_SERIALIZER = "fedexec"  # What proxies call the pair of functions with which they talk to their Manager.
_listener_client: dict[str, Any] = managers.listener_client  # type: ignore[attr-defined]
_listener_client[_SERIALIZER] = (Listener, _connect)


class _Server(managers.Server):
    """What runs in the Manager's process: it reads nothing from another user, though he knew the key."""

    def handle_request(self, connection: Connection) -> None:
        """Answer one request, unless it is of another user."""
        if _is_of_this_user(connection):
            super().handle_request(connection)
        else:
            connection.close()


def _is_of_this_user(connection: Connection) -> bool:
    return _peer(connection)[1] == os.geteuid()


def _peer(connection: Connection) -> tuple[int | None, int]:
    """Return pid and user of the process at the other end; not on Linux: None, and this user."""
    if not hasattr(socket, "SO_PEERCRED"):  # The key, and the private directory of the socket, must do.
        return None, os.geteuid()
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


class _Manager(SyncManager):
    """A Manager that leaves no file behind, whoever kills it, and never outlives the caller."""

    _Server = _Server

    def __init__(self, context: WorkerContext) -> None:
        # An abstract socket has no name in the file system, so nobody has to remove it. Only Linux has them.
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
        """Return whether its process runs."""
        return self._process is not None and self._process.is_alive()

    def end(self) -> None:
        """End its process, and let go of it."""
        self.shutdown()
        self._forget()

    def _forget(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.pid is not None:
            end_process(process)
            process.join()
            process.close()
        if self._directory is not None:  # It is there still if the process was killed.
            _remove(self._directory)


def _prepare_manager(directory: Path | None) -> None:
    os.setpgid(0, 0)  # Ctrl+C is the caller's business
    if directory is None:
        end_with_caller()
    else:
        directory.mkdir(0o700)
        util.Finalize(None, _remove, (directory,), exitpriority=_AFTER_THE_SOCKET)
        end_with_caller(functools.partial(_remove, directory))


def _new_directory() -> Path:
    """Return a name that nobody has, or can guess, for the private directory of a Manager's socket."""
    name = f"fedexec-{secrets.token_hex(8)}"
    path = Path(tempfile.gettempdir(), name)
    return path if len(os.fsencode(path)) <= _LONGEST_PATH else Path("/tmp", name)


def _remove(directory: Path) -> None:
    """Remove a Manager's socket and its directory, as far as they are there, and nothing else."""
    for _ in range(2):  # The Manager's main thread may make the socket just after the first attempt.
        with contextlib.suppress(OSError):
            (directory / _SOCKET).unlink()
        with contextlib.suppress(OSError):
            directory.rmdir()


def _work(wanted: WorkerSetup, message: bytes, return_dict: MutableMapping[str, bytes]) -> None:
    """Run in the worker: be set up, run the task, leave its answer."""
    setup(wanted)
    try:
        return_dict["reply"] = run(message)
    except _MANAGER_GONE:
        os._exit(1)  # the caller says what happened
