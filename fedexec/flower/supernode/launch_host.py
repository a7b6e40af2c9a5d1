"""The other end of the launchers: each command that they stand for becomes a task of an executor."""

import concurrent.futures
import contextlib
import functools
import hmac
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path
from typing import Any

from fedexec._system.error_text import one_line
from fedexec.errors import WorkerDiedError
from fedexec.executor import Executor
from fedexec.flower.supernode import launcher, warm_command

__all__ = ["COMMAND", "LaunchHost"]

log = logging.getLogger("fedexec.flower")

COMMAND = "flwr-clientapp"
# Its arguments in flwr 1.38 to 1.42, without those for an environment of the app's own, for which a process
# that has imported packages already is not fit.
_KNOWN = {
    "--runtime-api-address", "--token", "--token-file", "--token-stdin", "--insecure", "--root-certificates",
    "--parent-pid",
}  # fmt: skip
_HEAD = 2 * 16 + len(" launch ") + 12 + 1  # bytes
WAIT_SECONDS = 25.0
"""A SuperNode starts a command again that has not spoken within 30 s, so after that time nobody waits."""
TRY_LATER = 75  # exit code


class LaunchHost:
    """Listens for launchers, and runs what they stand for; a context manager.

    Parameters
    ----------
    executor : Executor
        Its workers should start with :func:`warm_command.warm` done.

    Attributes
    ----------
    variables : dict
        The environment of whoever starts commands.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._key = secrets.token_hex(16)
        self._listener = socket.socket(socket.AF_UNIX)
        self._directory: str | None = None
        self._address = self._bind()
        self._listener.listen(socket.SOMAXCONN)
        folder = Path(launcher.__file__).parent
        self.variables = {
            "PATH": os.pathsep.join([str(folder / "bin"), os.environ.get("PATH", os.defpath)]),
            "_FEDEXEC_PYTHON": sys.executable,
            "_FEDEXEC_LAUNCHER": str(folder / "launcher.py"),
            "_FEDEXEC_SOCKET": self._address.replace("\0", "@"),
            "_FEDEXEC_KEY": self._key,
        }
        self._lock = threading.Lock()  # guards what follows
        self._lent: dict[str, list[int]] = {}  # ticket -> the streams that a worker will ask for
        self._told: set[str] = set()

    def __enter__(self) -> "LaunchHost":
        threading.Thread(target=self._accept, name="fedexec-launches", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _bind(self) -> str:
        if sys.platform == "linux":  # no file, so nothing can be left
            address = f"\0fedexec-{secrets.token_hex(8)}"
        else:
            self._directory = tempfile.mkdtemp(prefix="fx")
            address = os.path.join(self._directory, "s")  # noqa: PTH118
        self._listener.bind(address)
        return address

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(
                target=self._answer, args=(connection,), name="fedexec-launch", daemon=True
            ).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(WAIT_SECONDS)  # a stranger may connect, and say nothing
            head, streams, _, _ = socket.recv_fds(connection, _HEAD, 3)
            try:
                key, kind, rest = head.decode("ascii", "replace").split()
                if not hmac.compare_digest(key, self._key):
                    return
                if kind == "take":
                    self._lend(connection, rest)
                else:
                    self._launch(connection, int(rest), streams)
            except ValueError:  # whoever it is, it is none of ours
                return
            finally:
                for stream in streams:
                    os.close(stream)

    def _lend(self, connection: socket.socket, ticket: str) -> None:
        """Give a worker the streams of the launcher whose command it runs."""
        with self._lock:
            streams = self._lent.pop(ticket, None)
        if streams is not None:
            socket.send_fds(connection, [b"."], streams)

    def _launch(self, connection: socket.socket, size: int, streams: list[int]) -> None:
        with connection.makefile("rb") as file:
            request = json.loads(file.read(size))
        command: list[str] = request["command"]
        unknown = sorted({each.partition("=")[0] for each in command if each.startswith("--")} - _KNOWN)
        if command[0] != COMMAND or unknown:
            self._tell_once(f"{command[0]} {' '.join(unknown)} is not known to be fit for a warm process")
            connection.sendall(b"%d\n" % launcher.COLD)
            return
        ticket = secrets.token_hex(6)
        with self._lock:
            self._lent[ticket] = streams
        try:
            self._run(connection, ticket, request)
        except BrokenExecutor as exc:
            self._tell_once(f"no warm process can be started: {one_line(exc)}")
            connection.sendall(b"%d\n" % launcher.COLD)
        except RuntimeError:  # the executor has been shut down, so the SuperNode is ending, too
            return
        finally:
            with self._lock:
                self._lent.pop(ticket, None)

    def _run(self, connection: socket.socket, ticket: str, request: dict[str, Any]) -> None:
        """Have a worker run a command, and stay until it has ended."""
        lender = (self._address, f"{self._key} take   {ticket:>12}\n".encode())
        environ = self._own(request["environ"])
        executor = self._executor.with_options(tag=COMMAND)
        future = executor.submit(warm_command.run, lender, request["command"], request["cwd"], environ)
        over = threading.Event()
        future.add_done_callback(functools.partial(self._finish, connection, over, ticket))
        self._attend(connection, future, ticket, over)
        over.wait()

    def _own(self, environ: dict[str, str]) -> dict[str, str]:
        """Return a launcher's environment without what we have added to it."""
        own = {name: value for name, value in environ.items() if name not in self.variables}
        ours = self.variables["PATH"].partition(os.pathsep)[0]
        path = environ.get("PATH", os.defpath).split(os.pathsep)
        return {**own, "PATH": os.pathsep.join(each for each in path if each != ours)}

    def _attend(
        self, connection: socket.socket, future: "Future[int]", ticket: str, over: threading.Event
    ) -> None:
        """Pass the launcher's signals on, until it or its command has ended."""
        connection.settimeout(WAIT_SECONDS)
        while not over.is_set():
            try:
                numbers = connection.recv(16)
            except TimeoutError:
                connection.settimeout(None)
                if self._waits(ticket) and future.cancel():
                    log.info("a message has waited for %g s, its SuperNode will start it again", WAIT_SECONDS)
                continue
            except OSError:
                numbers = b""
            if over.is_set():
                return
            if not numbers:  # it was killed, so its command shall not go on
                self._executor.end(future)
                return
            for number in numbers:
                self._executor.end(future, number)

    def _finish(
        self, connection: socket.socket, over: threading.Event, ticket: str, future: "Future[Any]"
    ) -> None:
        """Tell the launcher how its command has ended; a callback, so it must not raise."""
        with contextlib.suppress(OSError):
            connection.sendall(b"%d\n" % self._code_of(future, ticket))
            over.set()
            connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that attends
        over.set()

    def _waits(self, ticket: str) -> bool:
        """Return whether a command has not begun."""
        with self._lock:
            return ticket in self._lent

    def _code_of(self, future: "Future[int]", ticket: str) -> int:
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            return TRY_LATER
        except Exception as exc:
            if isinstance(exc, WorkerDiedError) and exc.exitcode is not None:
                if not exc.is_deliberate:
                    log.warning("%s", exc)
                return exc.exitcode
            if not self._waits(ticket):  # it has begun, so it must not run again
                log.warning("%s", exc)
                return 1
            self._tell_once(f"no warm process can run it: {one_line(exc)}")
            return launcher.COLD

    def _tell_once(self, reason: str) -> None:
        with self._lock:
            is_new = reason not in self._told
            self._told.add(reason)
        if is_new:
            log.warning("a ClientApp starts cold, as it would without fedexec: %s", reason)
