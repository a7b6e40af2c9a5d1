"""How a template learns: a forked child imports the modules and, if all is well, replaces the template.

If an import hangs, kills its process or leaves a thread, it does so in a child that no task depends on. A
child that is fit to be forked becomes the template, so nothing is imported twice and no worker waits. The old
template stays as the child's parent: it reaps the workers that it has forked, and ends when its successor
ends.
"""

import contextlib
import json
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import NoReturn, Protocol

from fedexec._processes import fork_fitness
from fedexec._processes.leaving import end_with_parent
from fedexec._processes.process_state import difference, process_state, tidied
from fedexec._worker import imports
from fedexec._worker.ending import leave
from fedexec._worker.threads import THREAD_VARIABLES
from fedexec.devices.device import hidden

__all__ = ["Trial", "import_quietly", "rehearse", "silence"]

ATTEMPTS = 8  # one for each module that turns out to be unfit; after that, nothing more is learnt
LEAVE_SECONDS = 1.0  # time that a child that has failed has for its exit functions


class TemplateSteps(Protocol):
    """The template's own steps in a child on trial, before and after the imports."""

    def detach(self) -> None:
        """Release what only the old template needs."""

    def get_ready(self) -> None:
        """Make the preparations that come before the first fork."""

    def take_over(self) -> NoReturn:
        """Run as the template."""


class Trial:
    """A child process that tries to import modules, and rehearses.

    After a failure, the next child tries again without the module that is to blame.

    Parameters
    ----------
    modules : iterable of str
    steps : TemplateSteps
        The template's own steps in the child.
    seconds : float
        Time that the import of one module, or the rehearsal, may take.
    rehearsal : tuple of str and bytes, optional
        Name and pickled call, which is made after the imports.
    path : list of str, optional
        ``sys.path`` of the caller when it asked.

    Attributes
    ----------
    pid : int
        The child's pid; -1 if there is nothing to import.
    fd : int
        Becomes readable when :meth:`hear` has something to read.
    deadline : float
        Time of :func:`time.monotonic` from which the child counts as hanging.
    learnt : list of str or None
        Modules that the child has imported; None until it is ready to replace the template.
    unfit : dict of str to str
        Module (or name of the rehearsal) that was left out -> reason.
    raised : str
        Traceback of the exception that the rehearsal raised; empty if there is none.
    """

    def __init__(
        self,
        modules: Iterable[str],
        steps: TemplateSteps,
        seconds: float,
        rehearsal: tuple[str, bytes] | None = None,
        path: list[str] | None = None,
    ) -> None:
        self._modules = [name for name in modules if name not in sys.modules]
        self._steps = steps
        self._seconds = seconds
        self._rehearsal = rehearsal
        self._path = path
        self._attempts = 0
        self.raised = ""
        self.unfit: dict[str, str] = {}
        self._start()

    def _start(self) -> None:
        self.pid = self.fd = -1
        self.learnt: list[str] | None = None
        self.deadline = time.monotonic() + self._seconds
        self._doing, self._buffer = "", b""
        self._hangs = self._has_told = False
        if not (self._modules or self._rehearsal) or self._attempts >= ATTEMPTS:
            return
        self._attempts += 1
        self.fd, writing = os.pipe()
        os.set_blocking(self.fd, False)
        reading, self._go = os.pipe()
        self.pid = fork_fitness.fork()
        if self.pid == 0:
            os.close(self.fd)
            os.close(self._go)
            self._run_child(writing, reading)
        os.close(writing)
        os.close(reading)

    def read_reports(self) -> bool:
        """Read the child's reports.

        Returns
        -------
        bool
            Whether no more reports will come.
        """
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:  # The child has ended, but a process that it left still has the pipe open.
            return True
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in map(json.loads, lines):
            if "doing" in line:
                self._doing = line["doing"]
                self.deadline = time.monotonic() + self._seconds
            elif "unfit" in line:
                self._has_told = True
                self.deadline = time.monotonic() + LEAVE_SECONDS
                self.raised = line.get("raised", "")
                if line["module"]:
                    self._leave_out(line["module"], line["unfit"])
            else:
                self.learnt = line["learnt"]
        return not data

    def take_over(self) -> None:
        """Tell the child, which is ready, to replace the template."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"g")
        self.close()

    def end(self) -> None:
        """Kill the child, which hangs or is no longer needed."""
        self._hangs = True
        for send in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.pid, signal.SIGKILL)

    def failed(self, status: int) -> None:
        """Note why the child has ended, and start another child if anything is left to try.

        Parameters
        ----------
        status : int
            The child's wait status.
        """
        if self._has_told:
            pass  # The child has told the reason; it may have been killed since.
        elif self._hangs:
            self._leave_out(self._doing, f"{self._subject()} was not done after {self._seconds:g} s")
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGTERM):
            self._modules, self._rehearsal = [], None  # Another process has killed the child, not a module.
        else:
            code = os.waitstatus_to_exitcode(status)
            self._leave_out(self._doing, f"{self._subject()} ended the process with {code}")
        self.close()
        self._start()

    def _subject(self) -> str:
        return "it" if self._rehearsal and self._rehearsal[0] == self._doing else "its import"

    def _leave_out(self, module: str, reason: str) -> None:
        self.unfit[module] = reason
        if self._rehearsal and self._rehearsal[0] == module:
            self._rehearsal = None
        inside = f"{module}."
        self._modules = [name for name in self._modules if name != module and not name.startswith(inside)]

    def close(self) -> None:
        """Close the pipes to the child."""
        os.close(self.fd)
        os.close(self._go)

    # ------------------------------------------------------------ in the child

    def _run_child(self, writing: int, reading: int) -> NoReturn:
        def report(**line: object) -> None:
            os.write(writing, json.dumps(line).encode() + b"\n")

        try:
            end_with_parent()
            os.setpgid(0, 0)
            self._steps.detach()
            if self._path is not None:
                sys.path[:] = imports.birth_path[:] = self._path
            learnt = self._import_all(report)
            if learnt is not None:
                imports.learnt.update(learnt)
                self._steps.get_ready()
                report(learnt=learnt)
                os.close(writing)
                if os.read(reading, 1):
                    os.close(reading)
                    self._steps.take_over()
        except BaseException as exc:
            with contextlib.suppress(OSError):
                report(module=self._doing, unfit=f"its import failed: {exc!r}")
        leave()  # leave() runs the exit functions that the imports have registered.

    def _import_all(self, report: Callable[..., None]) -> list[str] | None:
        """Import the modules; return None if they make this process unfit to be a template.

        The first child checks once, at the end. Later children check after each module, which takes longer.
        """
        is_first = self._attempts == 1
        before = process_state()
        put_back = fork_fitness.show_devices()
        # so that libraries start no threads when they are loaded
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
        with silence(), fork_fitness.no_torch_threads(), tidied():
            for module in dict.fromkeys(name for each in self._modules for name in _with_parents(each)):
                if module in sys.modules:
                    continue
                self._doing = module
                report(doing=module)
                import_quietly(module)
                if not is_first and (reason := _why_not(before)):
                    report(module=module, unfit=reason)
                    return None
            if self._rehearsal and not self._rehearse(self._rehearsal, report):
                return None
        put_back()
        learnt = [module for module in self._modules if module in sys.modules]
        if (is_first or self._rehearsal) and (reason := _why_not(before)):
            # The next child finds out which of several modules is to blame.
            report(module="" if learnt else self._doing, unfit=reason)
            return None
        return learnt + ([self._rehearsal[0]] if self._rehearsal else [])

    def _rehearse(self, rehearsal: tuple[str, bytes], report: Callable[..., None]) -> bool:
        """Make the call; return whether it has succeeded."""
        self._doing, call = rehearsal
        report(doing=self._doing)
        try:
            rehearse(call)
        except BaseException:
            report(module=self._doing, unfit="it has raised", raised=traceback.format_exc())
            return False
        return True


def _with_parents(module: str) -> Iterator[str]:
    """Yield the packages that contain a module, then the module, so that the harmful one can be named."""
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        yield ".".join(parts[:number])


def import_quietly(module: str) -> None:
    """Import a module if possible; an error is ignored, because the task that needs the module meets it.

    Parameters
    ----------
    module : str
    """
    with contextlib.suppress(Exception):
        import_module(module)


def rehearse(call: bytes) -> None:
    """Make a pickled call on the CPU.

    The GPUs are hidden during the call, because no forked worker could use a GPU that this process has
    initialized. Unpickling still sees the GPUs, because a module may choose its device when it is imported.

    Parameters
    ----------
    call : bytes
        The pickled function.
    """
    fn = pickle.loads(call)
    with hidden():
        fn()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Discard what modules print when they are imported, because no single task asked for the import."""
    null = os.open(os.devnull, os.O_RDWR)
    saved = [os.dup(number) for number in (1, 2)]
    try:
        for number in (1, 2):
            os.dup2(null, number)
        yield
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        for number, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        os.close(null)


def _why_not(before: dict[str, object]) -> str | None:
    """Return why this process cannot replace the template; None if it can."""
    if reason := difference(before):
        return reason
    if children := _children():
        return f"it leaves processes running: {children}"
    return fork_fitness.why_unfit() or fork_fitness.why_no_child_answers()


def _children() -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().strip()
    return ""
