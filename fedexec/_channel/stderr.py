"""What a task writes to stderr: passed on as it comes, and its end kept, for the error if its worker dies.

A worker's stderr becomes a pipe of the caller's, which a task's message names, as it names shared memory. A
thread of the caller reads the pipes. Linux only; elsewhere a worker writes where the caller does, unheard.
"""

import contextlib
import faulthandler
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Iterator

if sys.platform == "linux":
    import fcntl
    import termios

from fedexec.interface import Task

__all__ = ["Relay", "listen", "rehearse", "unread"]

PIPE_BYTES = 1 << 16  # what a pipe holds: one read takes all that is there
NOTHING = bytes(4)  # unread, as the kernel says it
KEPT_BYTES = 16 << 10
KEPT_LINES = 40
_FATAL = "Fatal Python error: "
_C_STACK = re.compile(r"^Current thread's C stack trace .*\n(?:  .*\n?)*\n?", re.MULTILINE)


class Relay:
    """The caller's end: a line for each task that runs at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards everything below, and what is kept of a line
        self._lines: dict[int, _Line] = {}  # descriptor -> its line
        self._free: list[_Line] = []
        self._poll = select.poll() if sys.platform == "linux" else None
        self._thread: threading.Thread | None = None
        self._wakeup = (-1, -1)

    @contextlib.contextmanager
    def line(self, task: Task) -> Iterator["_Line | None"]:
        """Lend a line to one task; None where there is none to be had.

        Whoever borrows it takes its tail where the worker leaves something unread: each read here lets
        another thread in, and would make tasks that say nothing some percent slower.
        """
        try:
            line = self._take()
        except OSError:  # no descriptors: the task matters more than its last words
            line = None
        if line is not None:
            line.task = task
        try:
            yield line
        finally:
            if line is not None:
                with self._lock:
                    line.kept, line.task = b"", None
                    self._free.append(line)

    def close(self) -> None:
        """Pass on the rest, and close every pipe. Called when no worker is left."""
        if self._thread is None:
            return
        os.write(self._wakeup[1], b"x")
        self._thread.join()
        for line in self._lines.values():
            line.tail()
            os.close(line.fd)
        os.close(self._wakeup[0])
        os.close(self._wakeup[1])
        self._thread = None

    def _take(self) -> "_Line | None":
        with self._lock:
            if self._free:
                return self._free.pop()
            if self._poll is None:
                return None
            if self._thread is None:
                self._wakeup = os.pipe()
                self._poll.register(self._wakeup[0], select.POLLIN)
                self._thread = threading.Thread(target=self._pass_on, name="fedexec-stderr", daemon=True)
                self._thread.start()
            line = _Line(self._lock)
            self._lines[line.fd] = line
            self._poll.register(line.fd, select.POLLIN)
            os.write(self._wakeup[1], b"+")  # it polls a set without this line
            return line

    def _pass_on(self) -> None:
        assert self._poll is not None
        while True:
            for fd, _ in self._poll.poll():
                if fd != self._wakeup[0]:
                    self._lines[fd].tail()
                elif b"x" in os.read(fd, 1024):
                    return


class _Line:
    """One pipe. Both ends stay open here, so that it never ends: in one descriptor, as lines are many."""

    def __init__(self, lock: threading.Lock) -> None:
        ends = os.pipe()
        try:
            self.fd = os.open(f"/proc/self/fd/{ends[0]}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(ends[0])
            os.close(ends[1])
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"  # where another process finds the pipe
        self.kept = b""
        self.task: Task | None = None
        self._lock = lock

    def tail(self) -> str:
        """Pass on what has come, and return the last lines since the task began."""
        with self._lock:
            try:
                data = os.read(self.fd, PIPE_BYTES)
            except BlockingIOError:
                data = b""
            self.kept = (self.kept + data)[-KEPT_BYTES:]
            # What one that is ended has to say is for its error alone: it is the stack of each thread.
            is_ended = self.task is not None and self.task.doomed
            with contextlib.suppress(OSError):  # the caller has closed its own
                while data and not is_ended:
                    data = data[os.write(2, data) :]
            return last_lines(self.kept.decode(errors="replace"))


def last_lines(text: str) -> str:
    """Return the last lines of what a worker has written, by which its end is explained.

    Of the report of a fatal signal its first line is kept, which names the signal, and not the stack of C
    functions, which Python adds from 3.14 on: it alone may have as many lines as are kept.
    """
    lines = _C_STACK.sub("", text).splitlines()
    last = lines[-KEPT_LINES:]
    fatal = [line for line in lines[:-KEPT_LINES] if line.startswith(_FATAL)]
    return "\n".join([fatal[-1], *last[1:]] if fatal else last)


_rehearsed = False
_path: str | None = None  # what a worker listens to
_pipe: os.stat_result | None = None  # that, once it has had a second task


def rehearse() -> None:
    """Do once, where workers are forked from, what each would do when its first task comes."""
    global _rehearsed
    if _rehearsed or sys.platform != "linux":
        return
    _rehearsed = True
    if not faulthandler.is_enabled():
        faulthandler.enable(2)
    faulthandler.register(signal.SIGTERM, 2, chain=True)
    os.register_at_fork(before=_hold_sigterm, after_in_child=_end_quietly, after_in_parent=_heed_sigterm)


_masks = threading.local()  # of the thread that forks: the signals that it had blocked before


def _hold_sigterm() -> None:
    """Have SIGTERM wait until a process that a task forks no longer says where it was."""
    if _path is not None:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _heed_sigterm() -> None:
    if _path is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _end_quietly() -> None:
    """Have what a worker forks say nothing when SIGTERM ends it: a task ends its own children that way."""
    if _path is not None:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # else the task has a handler of its own
            faulthandler.unregister(signal.SIGTERM)
        _heed_sigterm()


def listen(path: str) -> None:
    """Have this process, a worker, write its stderr there; and say where it was if a signal ends it."""
    global _path, _pipe
    again = path == _path
    try:
        if again and _pipe is not None and os.path.samestat(_pipe, os.fstat(2)):
            return  # no task has put another in its place
        pipe = os.open(path, os.O_WRONLY)
        os.dup2(pipe, 2)
        os.close(pipe)
        _pipe = os.fstat(2) if again else None
    except OSError:  # a hardened /proc; a task that has closed what is not its own
        return
    _path = path
    rehearse()


def unread() -> bool:
    """Return whether the caller may not have read all that this process, a worker, has written there."""
    if _path is None:
        return False
    try:
        return fcntl.ioctl(2, termios.FIONREAD, NOTHING) != NOTHING
    except OSError:  # a task has put something else in its place
        return True
