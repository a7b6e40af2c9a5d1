"""Starts the worker processes of one executor: forked from its template, or as fresh interpreters."""

import functools
import logging
import os
import shutil
import sys
from collections.abc import Callable
from multiprocessing import resource_tracker, spawn

if sys.platform == "linux":
    import fcntl

from fedexec._channel.pickling import dumps
from fedexec._channel.template_learning import Learner, Lesson
from fedexec._processes.forker import Service
from fedexec._processes.forkserver_client import Template, UnfitTemplateError
from fedexec._processes.mp_context import WorkerProcess
from fedexec._processes.popen import ForkedPopen, ServedPopen, SpawnedPopen, WorkerPopen
from fedexec._processes.resource_trackers import start_tracker_apart
from fedexec._worker.setup import environment
from fedexec.errors import BackendUnavailableError, PreloadError
from fedexec.interface import Hooks
from fedexec.settings import Settings

__all__ = ["Launcher"]

log = logging.getLogger("fedexec")
_NO_WAITID = 'start_method="forkserver" needs os.waitid, new in Python 3.13 on macOS; "spawn" does without'


class Launcher:
    """Starts the worker processes of one executor.

    Parameters
    ----------
    settings : Settings
        Start method, preload, and whether the template learns.
    hooks : Hooks
        The warm-up.
    backend : str
        The backend's module, whose functions the workers run.
    service : Service, optional
        What every worker does. A process object then has a connection as its only argument.
    """

    def __init__(
        self, settings: Settings, hooks: Hooks, backend: str, service: Service | None = None
    ) -> None:
        _open_standard_streams()
        _try_signals()
        start_tracker_apart(resource_tracker)
        self.template: Template | None = None
        self._learns = settings.learn
        self._insists = settings.sources.get("start_method", "default") != "default"
        if settings.start_method == "forkserver":
            if not hasattr(os, "waitid"):
                raise BackendUnavailableError(settings.backend, _NO_WAITID)
            self.template = Template(
                settings.preload,
                hooks.warmup,
                settings.preload_timeout,
                backend,
                service,
                environment(settings),
            )

    def start(self) -> None:
        """Import the preload in the template, if there is one.

        A template that is unfit to be forked is given up with one warning. Each worker is then a fresh
        interpreter that imports the preload itself.

        Raises
        ------
        PreloadError
            A module cannot be imported. Or a module makes the template unfit, and either the user has asked
            for "forkserver", or fresh interpreters cannot be started here.
        """
        if self.template is None:
            return
        try:
            self.template.start()
        except UnfitTemplateError as exc:
            if self._insists:
                exc.add_note('start_method="forkserver" was asked for; with "spawn" workers start afresh.')
                raise
            if not _can_spawn():
                exc.add_note(
                    f"Nor can fresh interpreters be started: {spawn.get_executable()!r} cannot be executed."
                )
                raise
            log.warning(
                "%s. Until then each worker is a fresh interpreter, which takes longer to start "
                '(start_method="spawn" does the same without this warning).',
                str(exc),
            )
            self.template = None

    def learner(self, renew: Callable[[], object] = lambda: None) -> Learner | None:
        """Return the learner, which decides which modules the template imports for its workers.

        Parameters
        ----------
        renew : callable
            Replaces waiting workers; see :class:`fedexec._channel.template_learning.Learner`.

        Returns
        -------
        Learner or None
            None if workers are not forked, or if learning is off.
        """
        return Learner(self._learn, renew) if self._learns and self.template is not None else None

    def _learn(self, modules: tuple[str, ...]) -> Lesson:
        return Lesson() if self.template is None else self.template.learn(modules)

    def rehearse(self, call: Callable[[], object], name: str, renew: Callable[[], object]) -> str | None:
        """Call a function in the template, so that later workers inherit what the call leaves in memory.

        Parameters
        ----------
        call : callable
            A function without arguments.
        name : str
            Name of the function, for messages.
        renew : callable
            Called after success; replaces the waiting workers, which lack what the call has left.

        Returns
        -------
        str or None
            Why workers do not inherit it, a sentence with the subject "it"; None on success.
        """
        if self.template is None:
            return "it starts its workers as fresh interpreters, which inherit nothing"
        reason = self.template.rehearse(dumps(call), name)
        if reason is None:
            renew()
        return reason

    def stop(self) -> None:
        """End the template, if there is one."""
        if self.template is not None:
            self.template.stop()

    def launch(self, process: "WorkerProcess") -> "WorkerPopen":
        """Start one process: forked from the template, or as a fresh interpreter.

        Parameters
        ----------
        process : WorkerProcess

        Returns
        -------
        WorkerPopen
            The handle that multiprocessing keeps as the process's ``_popen``.
        """
        if self.template is not None:
            try:
                popen = ForkedPopen if self.template.service is None else ServedPopen
                return popen(process, self.template)
            except (EOFError, OSError, PreloadError) as exc:
                # If this error reached a pool's management thread, the thread would end and its futures would
                # never be done. A spawned worker imports the preload itself; if that fails, its task fails.
                log.warning("the template cannot be replaced, so a worker is spawned instead: %s", str(exc))
        return SpawnedPopen(process)


def _can_spawn() -> bool:
    """Return whether a fresh interpreter can be started."""
    return shutil.which(os.fsdecode(spawn.get_executable() or "")) is not None


def _open_standard_streams() -> None:
    """Open descriptors 0, 1 and 2 if they are closed, as in a daemon.

    Otherwise pipes of fedexec would get these numbers, and code that uses a standard stream, in this process
    or in a worker, would damage a pipe.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # The lowest free number is used.
            os.set_inheritable(opened, True)


@functools.cache
def _try_signals() -> None:
    """Warn once if the kernel cannot signal workers when this process ends."""
    reading, writing = os.pipe()
    try:
        if sys.platform == "linux":
            fcntl.fcntl(reading, fcntl.F_SETOWN, os.getpid())
            fcntl.fcntl(reading, fcntl.F_SETSIG, 0)
    except OSError as exc:
        log.warning(
            "this system refuses F_SETSIG (%s): a thread in each worker watches for the end of this process, "
            "which a task that keeps Python's global lock may outlive",
            exc,
        )
    finally:
        os.close(reading)
        os.close(writing)
