"""How a template learns: a forked child imports what is to be learnt and, if all is well, takes its place.

Whatever an import does, hangs, kills its process, leaves a thread, it does to a child that nobody needs yet.
One that is fit to be forked becomes the template: nothing is imported twice, and no worker waits meanwhile.
The old one stays as its parent, to reap the workers that it has forked and to end when its successor does.
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
from typing import Any, NoReturn, Protocol

from fedexec._processes import fitness
from fedexec._processes.leaving import end_with_parent
from fedexec._processes.process_state import difference, process_state, tidied
from fedexec._worker import imports
from fedexec._worker.ending import leave
from fedexec._worker.threads import THREAD_VARIABLES
from fedexec.devices.device import hidden

__all__ = ["Trial", "import_quietly", "rehearse", "silence"]

ATTEMPTS = 8  # one for each module that turns out to be unfit, until no more is learnt
LEAVE_SECONDS = 1.0  # that a child that has failed may take to do what was left to be done at exit


class Heir(Protocol):
    """What the child does beside importing: the template's own business. All of it happens in the child."""

    def detach(self) -> None:
        """Let go of what only the old template needs."""

    def get_ready(self) -> None:
        """Do what is done once, before workers are forked."""

    def take_over(self) -> NoReturn:
        """Be the template."""


class Trial:
    """A child that is trying to import modules; after one that failed, another without what was to blame.

    Parameters
    ----------
    modules : iterable of str
    heir : Heir
    seconds : float
        That the import of one module, or the rehearsal, may take.
    rehearsal : tuple of str and bytes, optional
        A name, and a pickled call to make after the imports.
    path : list of str, optional
        ``sys.path`` of the caller when it asked.

    Attributes
    ----------
    pid : int
        Of the child that is trying; -1 where there is nothing to import.
    fd : int
        Becomes readable when there is something to :meth:`hear`.
    deadline : float
        By :func:`time.monotonic`: then it hangs.
    learnt : list of str or None
        What it has imported, once it is ready to take over.
    unfit : dict of str to str
        Modules that were left out, or the rehearsal, and why.
    raised : str
        The traceback of what the rehearsal has raised.
    """

    def __init__(
        self,
        modules: Iterable[str],
        heir: Heir,
        seconds: float,
        rehearsal: tuple[str, bytes] | None = None,
        path: list[str] | None = None,
    ) -> None:
        self._modules = [name for name in modules if name not in sys.modules]
        self._heir = heir
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
        self.pid = fitness.fork()
        if self.pid == 0:
            os.close(self.fd)
            os.close(self._go)
            self._try_all(writing, reading)
        os.close(writing)
        os.close(reading)

    def hear(self) -> bool:
        """Read what the child says; return whether it says no more."""
        try:
            data = os.read(self.fd, 1 << 16)
        except BlockingIOError:  # it has ended, and left a process that still has the pipe
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
        """Have the child, which is ready, be the template."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"g")
        self.close()

    def end(self) -> None:
        """End the child, which hangs or is not needed any more."""
        self._hangs = True
        for send in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                send(self.pid, signal.SIGKILL)

    def failed(self, status: int) -> None:
        """Take note that the child has ended, with this wait status; start another if one is left to try."""
        if self._has_told:
            pass  # and it may have been ended since
        elif self._hangs:
            self._leave_out(self._doing, f"{self._subject()} was not done after {self._seconds:g} s")
        elif os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGTERM):
            self._modules, self._rehearsal = [], None  # Somebody has ended the child: no module is to blame.
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

    def _try_all(self, writing: int, reading: int) -> NoReturn:
        def tell(**line: object) -> None:
            os.write(writing, json.dumps(line).encode() + b"\n")

        try:
            end_with_parent()
            os.setpgid(0, 0)
            self._heir.detach()
            if self._path is not None:
                sys.path[:] = imports.birth_path[:] = self._path
            learnt = self._import_all(tell)
            if learnt is not None:
                imports.learnt.update(learnt)
                self._heir.get_ready()
                tell(learnt=learnt)
                os.close(writing)
                if os.read(reading, 1):
                    os.close(reading)
                    self._heir.take_over()
        except BaseException as exc:
            with contextlib.suppress(OSError):
                tell(module=self._doing, unfit=f"its import failed: {exc!r}")
        leave()  # and do what the imports have left to be done at exit

    def _import_all(self, tell: Callable[..., None]) -> list[str] | None:
        """Import the modules; None if that makes this process unfit to be a template.

        The first child looks once, at the end. Those after it look after each module, which takes longer.
        """
        is_first = self._attempts == 1
        before = process_state()
        put_back = fitness.show_devices()
        os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))  # so that libraries start none when loaded
        with silence(), fitness.no_torch_threads(), tidied():
            for module in dict.fromkeys(name for each in self._modules for name in _with_parents(each)):
                if module in sys.modules:
                    continue
                self._doing = module
                tell(doing=module)
                import_quietly(module)
                if not is_first and (reason := _why_not(before)):
                    tell(module=module, unfit=reason)
                    return None
            if self._rehearsal and not self._rehearse(self._rehearsal, tell):
                return None
        put_back()
        learnt = [module for module in self._modules if module in sys.modules]
        if (is_first or self._rehearsal) and (reason := _why_not(before)):
            # Which of several is to blame, the next child finds out.
            tell(module="" if learnt else self._doing, unfit=reason)
            return None
        return learnt + ([self._rehearsal[0]] if self._rehearsal else [])

    def _rehearse(self, rehearsal: tuple[str, bytes], tell: Callable[..., None]) -> bool:
        """Make the call; return whether it went well."""
        self._doing, call = rehearsal
        tell(doing=self._doing)
        try:
            rehearse(call)
        except BaseException:
            tell(module=self._doing, unfit="it has raised", raised=traceback.format_exc())
            return False
        return True


def _with_parents(module: str) -> Iterator[str]:
    """Yield the packages that a module is in, then the module: so the one that does harm can be told."""
    parts = module.split(".")
    for number in range(1, len(parts) + 1):
        yield ".".join(parts[:number])


def import_quietly(module: str) -> None:
    """Import a module, if that can be done; what is wrong with it, the task that needs it will be told."""
    with contextlib.suppress(Exception):
        import_module(module)


def rehearse(call: bytes) -> None:
    """Make a pickled call on the CPU, for no forked worker could use a GPU that this process has started.

    What is imported to unpickle it still sees the devices: it may decide once which one to use.
    """
    fn = pickle.loads(call)
    with hidden():
        fn()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep what modules print to themselves: the task that needs them does not import them any more."""
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


def _why_not(before: dict[str, Any]) -> str | None:
    """Return why this process cannot take the template's place; None if it can."""
    if reason := difference(before):
        return reason
    if children := _children():
        return f"it leaves processes running: {children}"
    return fitness.why_unfit() or fitness.why_no_child_answers()


def _children() -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text().strip()
    return ""
