"""The template: a clean process that imports the preload once and forks workers when asked.

This is :mod:`multiprocessing`'s forkserver with the differences a library needs: one for each executor
instead of one for the whole program; it ends with its executor; a preload that fails is an error that names
the module (the standard one ignores it silently); it sees the caller's ``sys.path``; nobody runs the caller's
``__main__`` again; and no socket in the file system.

This is the caller's end; what runs in the template is :mod:`fedexec._processes.forkserver_main`.
"""

import contextlib
import json
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from multiprocessing import get_start_method, process, resource_tracker, util
from multiprocessing.forkserver import MAXFDS_TO_SEND
from pathlib import Path
from typing import Any

from fedexec._channel.learning import Lesson
from fedexec._channel.pickling import dumps
from fedexec._processes import forkserver_main
from fedexec._processes.forker import Service
from fedexec._processes.leaving import has_ended
from fedexec._processes.stopped import await_answer, is_stopped, kill_if_stopped
from fedexec._system import forks
from fedexec._system.ownership import VARIABLE, Mark
from fedexec._worker.threads import THREAD_VARIABLES
from fedexec.errors import PreloadError
from fedexec.interface import function_name

__all__ = ["Template", "UnfitTemplateError", "preparation", "tracker_fd"]

log = logging.getLogger("fedexec")
_util: Any = util  # its underscored names, which type checkers do not know


class UnfitTemplateError(PreloadError):
    """What a module has done to the template makes it unfit to be forked.

    Parameters
    ----------
    module : str
        The one that did it.
    reason : str
        What it did, and what a worker would lose or could not use.
    """

    def __str__(self) -> str:
        return (
            f"Workers cannot be forked from a process that has imported {self.module}: {self.traceback}. "
            "Do that in initializer= or in the task instead"
        )


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
    environ : mapping of str to str, optional
        Variables of its workers: the devices that they see, which the template sees too, and how many threads
        they compute with. The template itself has one, for fork's sake.
    """

    def __init__(
        self,
        modules: Iterable[str],
        warmup: Callable[[], object] | None = None,
        timeout: float = 120.0,
        backend: str = __name__,
        service: Service | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.service = service
        one_thread = dict.fromkeys(THREAD_VARIABLES, "1")
        self._environ = dict(environ or {}) | one_thread
        threads = {name: value for name, value in (environ or {}).items() if name in one_thread}
        self._threads = threads if threads != one_thread else {}
        self._modules = (backend, *modules)
        self._warmup = None if warmup is None else dumps(warmup)
        self._warmup_name = "" if warmup is None else function_name(warmup)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._was_stopped = False
        self._is_discarded = threading.Event()
        self._learning = threading.Lock()  # held while it learns: one thing at a time
        self._learnt: list[str] = []  # modules that it has imported beside those; one that replaces it does
        self._rehearsals: list[tuple[str, bytes]] = []  # and calls that it has made, with their names

    def start(self) -> None:
        """Start the process and wait until the preload is imported.

        Raises
        ------
        PreloadError
            Names the module, with its traceback in the template.
        """
        with self._lock:
            self._ensure_running()

    def fork(self, fds: list[int]) -> int:
        """Have a worker forked that inherits `fds`; a template that has died is replaced first.

        Parameters
        ----------
        fds : list of int
            Data pipe to read the process object from, status pipe to write pid and exit code to, the
            resource tracker's pipe, and what the process object refers to; of a service, its connection.

        Returns
        -------
        int
            The pid of the process that was asked, for :func:`end_if_stopped`.
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
            assert self._process is not None
            return self._process.pid

    def learn(self, modules: Iterable[str]) -> Lesson:
        """Have it import more modules; workers that are forked when this returns have them.

        Workers are forked meanwhile as before. A module that would make the template unfit to be forked, or
        that changes what other tasks find, is left out: see :mod:`fedexec._processes.successor`.
        """
        with self._learning:
            told = self._teach({"modules": list(modules)})
            with self._lock:
                self._learnt += told.get("learnt", [])
        return Lesson(tuple(told.get("learnt", ())), told.get("unfit", {}))

    def rehearse(self, call: bytes, name: str) -> str | None:
        """Have it make a pickled call, once; workers that are forked after this inherit what the call leaves.

        Returns
        -------
        str or None
            Why they do not: what makes a template unfit, or different for other tasks.

        Raises
        ------
        PreloadError
            The call has raised; carries the traceback.
        """
        with self._learning:
            if call == self._warmup or (name, call) in self._rehearsals:
                return None
            told = self._teach({"modules": [], "rehearsal": name, "path": _sys_path()}, call)
            if raised := told.get("raised"):
                raise PreloadError(name, raised)
            if name not in told.get("learnt", ()):
                reason: str = told.get("unfit", {}).get(name, "its process was ended")
                return reason
            with self._lock:
                self._rehearsals.append((name, call))
        return None

    def _teach(self, wanted: dict[str, Any], call: bytes = b"") -> dict[str, Any]:
        """Tell it what to learn; return what it tells of that: nothing if it is dead, or was stopped."""
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as answer, tempfile.TemporaryFile() as lesson:
            lesson.write(json.dumps(wanted | {"seconds": self._timeout}).encode() + b"\n" + call)
            lesson.seek(0)
            try:
                with self._lock:
                    if self._was_stopped:  # A shutdown has come first: nobody would end another one.
                        return {}
                    socket.send_fds(self._ensure_running(), [b"l"], [lesson.fileno(), writing])
                    assert self._process is not None
                    pid = self._process.pid
            finally:
                os.close(writing)
            end_if_stopped(pid, reading)
            told: dict[str, Any] = json.loads(answer.read() or "{}")
        return told

    def stop(self) -> None:
        """End the template and every worker that still runs, for good. Returns when it is gone."""
        with self._lock:
            self._was_stopped = True
            self._discard()

    def _ensure_running(self) -> socket.socket:
        if self._process is not None and (has_ended(self._process.pid) or self._process.poll() is not None):
            self._discard()
        if self._control is None:
            self._launch()
        assert self._control is not None
        return self._control

    def _launch(self) -> None:
        with forks.no_fork():
            ours, theirs = socket.socketpair()
            forks.hold(ours.fileno())
        tracker = tracker_fd()
        wanted = {
            "tracker": tracker,
            "preparation": preparation("fedexec-worker"),
            "parent": (process.current_process().name, os.getpid()),
            "modules": self._modules,
            "learnt": self._learnt,
            "rehearsals": self._rehearsals,
            "warmup": self._warmup,
            "warmup_name": self._warmup_name,
            "threads": self._threads,
            "service": pickle.dumps(self.service),
        }
        command = [sys.executable, *_util._args_from_interpreter_flags()]
        command += [
            "-c",
            f"import sys; sys.path[:] = {_sys_path()!r}; from {forkserver_main.__name__} import main; main()",
        ]
        mark = Mark.own()
        # Ctrl+C is the caller's business: blocked until the template has a group of its own and ignores it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                pass_fds=[theirs.fileno(), tracker],
                env=os.environ | self._environ | ({VARIABLE: str(mark)} if mark else {}),
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
            self._await_readiness(self._process, ours)
            self._watch(self._process.pid)
        except BaseException as exc:
            if not isinstance(exc, PreloadError):
                self._process.kill()
            self._discard()
            raise

    def _await_readiness(self, process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        """Follow what the template says it does; raise PreloadError if it fails, dies or takes too long."""
        doing = "fedexec"
        deadline = time.monotonic() + self._timeout
        unread = b""
        while True:
            while b"\n" not in unread:
                if not await_answer([control], process.pid, deadline - time.monotonic()):
                    was_stopped = time.monotonic() < deadline
                    process.kill()
                    late = f"not done after {self._timeout:g} s"
                    raise PreloadError(doing, "its process was stopped" if was_stopped else late)
                if not (said := control.recv(1 << 16)):
                    raise PreloadError(doing, "the template process died")
                unread += said
            line, _, unread = unread.partition(b"\n")
            deadline = time.monotonic() + self._timeout  # for what comes next
            report = json.loads(line)
            if "unfit" in report:
                raise UnfitTemplateError(report["module"], report["unfit"])
            if "traceback" in report:
                raise PreloadError(doing, report["traceback"])
            if "ready" in report:
                return
            doing = report["doing"]

    def _watch(self, pid: int) -> None:
        """Have a template that stays stopped killed, where nobody but it can tell that a worker has ended."""
        try:
            os.close(os.pidfd_open(pid))
        except (AttributeError, OSError):
            self._is_discarded = threading.Event()
            kill_if_stopped(pid, self._is_discarded)

    def _discard(self) -> None:
        self._is_discarded.set()
        if self._control is not None:
            forks.let_go(self._control.fileno())
            self._control.close()
            self._control = None
        if self._process is not None:
            if is_stopped(self._process.pid):
                os.kill(self._process.pid, signal.SIGCONT)  # It would not end.
            if has_ended(self._process.pid, wait=True):
                # What an import has started there: a Manager, a pool. Workers have groups of their own.
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def end_if_stopped(pid: int, reading: int) -> None:
    """Wait until something can be read where a template, or what has taken its place, answers.

    One that stays stopped is killed: then the end can be read there, and the next request starts another.
    What has taken its place ends with it, and is ended by it when it is stopped.
    """
    if not await_answer([reading], pid) and is_stopped(pid):
        log.warning("the template (process %d) is stopped and does not answer: it is replaced", pid)
        with contextlib.suppress(ProcessLookupError):  # Several threads may wait for it.
            os.kill(pid, signal.SIGKILL)


def tracker_fd() -> int:
    """Return the pipe to the resource tracker, which is started if need be."""
    with forks.no_fork():  # A process forked meanwhile would inherit the tracker's lock, locked for ever.
        fd = resource_tracker.getfd()
    assert fd is not None
    return fd


def preparation(name: str) -> dict[str, Any]:
    """Return what multiprocessing tells a process of its parent's, but for the parent's ``__main__``.

    Unlike multiprocessing's own function it does not choose a start method for this process, which could not
    choose another one afterwards, and it does without a working directory that exists.

    Parameters
    ----------
    name : str
        Of the new process.
    """
    told = {
        "name": name,
        # Bytes, because the key's own type refuses to be pickled while no process is being started.
        "authkey": bytes(process.current_process().authkey),
        "log_to_stderr": _util._log_to_stderr,
        "sys_path": _sys_path(),
        "sys_argv": sys.argv,
        "orig_dir": process.ORIGINAL_DIR,  # type: ignore[attr-defined]
    }
    if _util._logger is not None:
        told["log_level"] = _util._logger.getEffectiveLevel()
    if (chosen := get_start_method(allow_none=True)) is not None:
        told["start_method"] = chosen  # of processes that tasks start, as it is here
    with contextlib.suppress(OSError):
        told["dir"] = str(Path.cwd())  # else the worker stays where it is: in the directory that was removed
    return told


def _sys_path() -> list[str]:
    """Return ``sys.path`` for another process: without what import ignores, and "" by its name."""
    here = process.ORIGINAL_DIR or ""  # type: ignore[attr-defined]
    return [str(entry or here) for entry in sys.path if isinstance(entry, str)]
