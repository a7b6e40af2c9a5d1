"""The caller's side of the template: a clean process that imports the preload and forks workers.

The template is multiprocessing's forkserver, adapted to the needs of a library. Each executor has its own
template instead of one for the whole program, and the template ends with its executor. A preload that fails
raises an error that names the module, where the standard forkserver ignores the failure. The template gets
the caller's ``sys.path``, does not run the caller's ``__main__`` again, and uses no socket in the file
system.

The template's own code is in :mod:`fedexec._processes.forkserver_main`.
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
from multiprocessing import process, util
from multiprocessing.forkserver import MAXFDS_TO_SEND
from typing import Any

from fedexec._channel.pickling import dumps
from fedexec._channel.template_learning import Lesson
from fedexec._processes import forkserver_main
from fedexec._processes.forker import Service
from fedexec._processes.leaving import end_group, has_ended
from fedexec._processes.preparation_data import preparation, sys_path, tracker_fd
from fedexec._processes.stopped_processes import await_answer, is_stopped, kill_if_stopped
from fedexec._system import forks
from fedexec._system.ownership import VARIABLE, Mark
from fedexec._worker.threads import THREAD_VARIABLES
from fedexec.errors import PreloadError
from fedexec.interface import function_name

__all__ = ["Template", "UnfitTemplateError", "end_if_stopped"]

log = logging.getLogger("fedexec")
_util: Any = util  # gives access to underscored names, which type checkers do not know


class UnfitTemplateError(PreloadError):
    """A module makes the template unfit to be forked.

    Parameters
    ----------
    module : str
        The module to blame.
    reason : str
        A sentence with the subject "it" (the module): what it did, and why that harms forked workers.
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
        Modules to import before the first worker is forked.
    warmup : callable, optional
        Function to call after these imports.
    timeout : float
        Seconds that each import, and the warm-up, may take.
    backend : str
        The backend's own module, which every worker needs first.
    service : Service, optional
        What every worker does; without it, each worker reads a process object.
    environ : mapping of str to str, optional
        Environment variables of the workers: the devices that they see (and the template, too), and their
        numbers of threads. The template itself uses one thread, because it forks.
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
        self._learning = threading.Lock()  # held during a lesson, because lessons run one at a time
        # A template that replaces a dead one imports these modules and repeats these calls, too.
        self._learnt: list[str] = []  # modules imported in addition to `modules`
        self._rehearsals: list[tuple[str, bytes]] = []  # (name, pickled call) of each rehearsal

    def start(self) -> None:
        """Start the process and wait until the preload is imported.

        Raises
        ------
        PreloadError
            A module cannot be imported; the error names the module and has its traceback in the template.
        UnfitTemplateError
            A module makes the template unfit to be forked.
        """
        with self._lock:
            self._ensure_running()

    def fork(self, fds: list[int]) -> int:
        """Fork a worker that inherits `fds`; a template that has died is replaced first.

        Parameters
        ----------
        fds : list of int
            In this order: the data pipe, from which the worker reads its process object; the status pipe, to
            which pid and exit code are written; the resource tracker's pipe; the descriptors that the process
            object refers to, or a service's connection.

        Returns
        -------
        int
            The pid of the process that was asked; see :func:`end_if_stopped`.

        Raises
        ------
        ValueError
            `fds` are more than one message can carry.
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
        """Import more modules in the template; workers that are forked afterwards have them.

        The template goes on forking workers meanwhile. A module is left out if it makes the template unfit to
        be forked, or if it changes what other tasks find: see :mod:`fedexec._processes.template_successor`.

        Parameters
        ----------
        modules : iterable of str

        Returns
        -------
        Lesson
            The modules that were imported, and those that were left out.
        """
        with self._learning:
            lesson = self._send_lesson({"modules": list(modules)})
            with self._lock:
                self._learnt += lesson.get("learnt", [])
        return Lesson(tuple(lesson.get("learnt", ())), lesson.get("unfit", {}))

    def rehearse(self, call: bytes, name: str) -> str | None:
        """Make a pickled call in the template; workers that are forked afterwards inherit what it leaves.

        Parameters
        ----------
        call : bytes
            The pickled function.
        name : str
            Name of the function, for messages.

        Returns
        -------
        str or None
            Why workers do not inherit it: the call makes the template unfit, or different for other tasks.

        Raises
        ------
        PreloadError
            The call has raised; the error carries the traceback.
        """
        with self._learning:
            if call == self._warmup or (name, call) in self._rehearsals:
                return None
            lesson = self._send_lesson({"modules": [], "rehearsal": name, "path": sys_path()}, call)
            if raised := lesson.get("raised"):
                raise PreloadError(name, raised)
            if name not in lesson.get("learnt", ()):
                reason: str = lesson.get("unfit", {}).get(name, "its process was ended")
                return reason
            with self._lock:
                self._rehearsals.append((name, call))
        return None

    def _send_lesson(self, request: dict[str, Any], call: bytes = b"") -> dict[str, Any]:
        """Send a lesson to the template; return its report (empty if the template is dead or was stopped)."""
        reading, writing = os.pipe()
        with os.fdopen(reading, "rb") as answer, tempfile.TemporaryFile() as file:
            file.write(json.dumps(request | {"seconds": self._timeout}).encode() + b"\n" + call)
            file.seek(0)
            try:
                with self._lock:
                    if self._was_stopped:  # stop() came first; a template started now would never be ended.
                        return {}
                    socket.send_fds(self._ensure_running(), [b"l"], [file.fileno(), writing])
                    assert self._process is not None
                    pid = self._process.pid
            finally:
                os.close(writing)
            end_if_stopped(pid, reading)
            report: dict[str, Any] = json.loads(answer.read() or "{}")
        return report

    def stop(self) -> None:
        """End the template and every worker that still runs, for good; return when the template is gone."""
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
        request = {
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
            f"import sys; sys.path[:] = {sys_path()!r}; from {forkserver_main.__name__} import main; main()",
        ]
        mark = Mark.own()
        # Ctrl+C is for the caller alone. Block it until the template leads its own group and ignores it.
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
                stdin.write(pickle.dumps(request))
            self._await_readiness(self._process, ours)
            self._watch(self._process.pid)
        except BaseException as exc:
            if not isinstance(exc, PreloadError):
                self._process.kill()
            self._discard()
            raise

    def _await_readiness(self, process: "subprocess.Popen[bytes]", control: socket.socket) -> None:
        """Follow the template's progress reports; raise PreloadError if it fails, dies or takes too long."""
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
                if not (data := control.recv(1 << 16)):
                    raise PreloadError(doing, "the template process died")
                unread += data
            line, _, unread = unread.partition(b"\n")
            deadline = time.monotonic() + self._timeout  # for the next step
            report = json.loads(line)
            if "unfit" in report:
                raise UnfitTemplateError(report["module"], report["unfit"])
            if "traceback" in report:
                raise PreloadError(doing, report["traceback"])
            if "ready" in report:
                return
            doing = report["doing"]

    def _watch(self, pid: int) -> None:
        """Kill a template that stays stopped, where only the template can report that a worker ended."""
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
                os.kill(self._process.pid, signal.SIGCONT)  # A stopped process would not end.
            if has_ended(self._process.pid, wait=True):
                # End what an import has started there (a Manager, a pool). Workers have groups of their own.
                end_group(self._process.pid)
            self._process.wait()
            self._process = None


def end_if_stopped(pid: int, reading: int) -> None:
    """Wait for an answer of a template or its successor; kill the template if it stays stopped.

    After the kill, the pipe's end can be read, and the next request starts another template. A successor ends
    with the template; the template itself ends a successor that is stopped.

    Parameters
    ----------
    pid : int
        The template.
    reading : int
        Descriptor that the answer is read from.
    """
    if not await_answer([reading], pid) and is_stopped(pid):
        log.warning("the template (process %d) is stopped and does not answer: it is replaced", pid)
        with contextlib.suppress(ProcessLookupError):  # Several threads may wait for the same template.
            os.kill(pid, signal.SIGKILL)
