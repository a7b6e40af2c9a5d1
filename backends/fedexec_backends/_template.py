"""The template: a clean process that imports the preload once and forks workers when asked.

This is :mod:`multiprocessing`'s forkserver with the differences a library needs: one for each executor
instead of one for the whole program; it ends with its executor; a preload that fails is an error that names
the module (the standard one ignores it silently); it sees the caller's ``sys.path``; nobody runs the caller's
``__main__`` again; and no socket in the file system.

This is the caller's end; what runs in the template is :mod:`fedexec_backends._forker`.
"""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing import process, spawn, util
from multiprocessing.forkserver import MAXFDS_TO_SEND
from typing import Any

import cloudpickle

from fedexec.errors import PreloadError
from fedexec.worker import THREAD_VARIABLES
from fedexec_backends import _forker
from fedexec_backends._forker import Service

__all__ = ["Template", "preparation"]

_util: Any = util  # its underscored names, which type checkers do not know


class Template:
    """The caller's end of a template process.

    Parameters
    ----------
    modules : iterable of str
        To import before the first worker is forked.
    warmup : callable or None
        To be called after that.
    timeout : float
        Seconds that both may take.
    backend : str
        The backend's own module, which every worker needs before anything else.
    service : Service, optional
        What every worker does; without it, each reads a process object that says so.
    """

    def __init__(
        self,
        modules: Iterable[str],
        warmup: Callable[[], object] | None = None,
        timeout: float = 120.0,
        backend: str = __name__,
        service: Service | None = None,
    ) -> None:
        self.service = service
        self._modules = (backend, *modules)
        self._warmup = None if warmup is None else cloudpickle.dumps(warmup)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Start the process and wait until the preload is imported.

        Raises
        ------
        PreloadError
            Names the module, with its traceback in the template.
        """
        with self._lock:
            self._ensure_running()

    def fork(self, fds: list[int]) -> None:
        """Have a worker forked that inherits `fds`; a template that has died is replaced first.

        Parameters
        ----------
        fds : list of int
            Data pipe to read the process object from, status pipe to write pid and exit code to, the
            resource tracker's pipe, and what the process object refers to; of a service, its connection.
        """
        if len(fds) > MAXFDS_TO_SEND:
            raise ValueError(f"too many file descriptors for one worker: {len(fds)} > {MAXFDS_TO_SEND}")
        with self._lock:
            control = self._ensure_running()
            try:
                socket.send_fds(control, [b"f"], fds)
            except OSError:
                self._discard()
                socket.send_fds(self._ensure_running(), [b"f"], fds)

    def stop(self) -> None:
        """End the template and every worker that still runs. Returns when it is gone."""
        with self._lock:
            self._discard()

    def _ensure_running(self) -> socket.socket:
        if self._process is not None and self._process.poll() is not None:
            self._discard()
        if self._control is None:
            self._launch()
        assert self._control is not None
        return self._control

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        wanted = {
            "preparation": preparation("fedexec-worker"),
            "parent": (process.current_process().name, os.getpid()),
            "modules": self._modules,
            "warmup": self._warmup,
            "service": pickle.dumps(self.service),
        }
        command = [sys.executable, *_util._args_from_interpreter_flags()]
        command += [
            "-c",
            f"import sys; sys.path[:] = {sys.path!r}; from {_forker.__name__} import main; main()",
        ]
        # Ctrl+C is the caller's business: blocked until the template has a group of its own and ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
                # One thread, for fork's sake; workers get their share of the cores when they are set up.
                env=os.environ | dict.fromkeys(THREAD_VARIABLES, "1"),
                process_group=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self._control = ours
        try:
            assert self._process.stdin is not None
            with self._process.stdin as stdin:
                stdin.write(pickle.dumps(wanted))
            self._await_readiness(ours)
        except BaseException:
            self._process.kill()
            self._discard()
            raise

    def _await_readiness(self, control: socket.socket) -> None:
        """Follow what the template says it does; raise PreloadError if it fails, dies or takes too long."""
        doing = "fedexec"
        deadline = time.monotonic() + self._timeout
        with control.makefile("rb") as reports:
            while True:
                control.settimeout(max(0.001, deadline - time.monotonic()))
                try:
                    report = json.loads(reports.readline() or b'{"traceback": "the template process died"}')
                except TimeoutError:
                    raise PreloadError(doing, f"not done after {self._timeout:g} s") from None
                if "traceback" in report:
                    raise PreloadError(doing, report["traceback"])
                if "ready" in report:
                    break
                doing = report["doing"]
        control.settimeout(None)

    def _discard(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.wait()
            self._process = None


def preparation(name: str) -> dict[str, Any]:
    """Return what multiprocessing tells a process of its parent's, but for the parent's ``__main__``.

    Parameters
    ----------
    name : str
        Of the new process.
    """
    data = spawn.get_preparation_data(name)
    # Bytes, because the key's own type refuses to be pickled while no process is being started.
    data["authkey"] = bytes(data["authkey"])
    return {key: value for key, value in data.items() if not key.startswith("init_main")}
