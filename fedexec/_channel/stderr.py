"""Passes on what tasks write to stderr, and keeps the last lines for the error if the worker dies.

On a node of a cluster, what tasks write to stdout is passed on too.

The stderr of a worker becomes a pipe of the caller, which the message of a task names as it names segments. A
thread of the caller reads the pipes. Linux only: elsewhere workers write to the caller's stderr directly, and
errors do not quote it.
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

__all__ = ["Relay", "listen", "redirect_stdout", "rehearse", "unread", "write_all"]

PIPE_BYTES = 1 << 16  # capacity of a pipe, so that one read takes everything
NOTHING = bytes(4)  # number of unread bytes if there are none, as the kernel writes it (an int)
KEPT_BYTES = 16 << 10  # the last bytes of a task that are kept
KEPT_LINES = 40  # the last lines of a task that an error quotes
_FATAL = "Fatal Python error: "
_C_STACK = re.compile(r"^Current thread's C stack trace .*\n(?:  .*\n?)*\n?", re.MULTILINE)


class Relay:
    """The caller's end: one pipe for each task that runs at the same time.

    Parameters
    ----------
    stream : int
        The descriptor to which tasks write: 1 is stdout, 2 is stderr.
    """

    def __init__(self, stream: int = 2) -> None:
        self._stream = stream
        self._lock = threading.Lock()  # guards everything below, and what each line keeps
        self._lines: dict[int, _Line] = {}  # by descriptor
        self._free: list[_Line] = []
        self._poll = select.poll() if sys.platform == "linux" else None
        self._thread: threading.Thread | None = None
        self._wakeup = (-1, -1)

    @contextlib.contextmanager
    def line(self, task: Task) -> Iterator["_Line | None"]:
        """Lend a pipe to one task; a context manager.

        The caller reads the pipe with ``tail()`` only if the reply says that something is unread: each read
        here lets another thread run, and would make tasks that write nothing some percent slower.

        Parameters
        ----------
        task : Task

        Yields
        ------
        _Line or None
            None if no pipe can be opened.
        """
        try:
            line = self._take()
        except OSError:  # without descriptors, the task still runs, but its error cannot quote stderr
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
        """Pass on what is left and close every pipe. This is called when no worker is left."""
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
            line = _Line(self._lock, self._stream)
            self._lines[line.fd] = line
            self._poll.register(line.fd, select.POLLIN)
            os.write(self._wakeup[1], b"+")  # the thread polls a set without this pipe until it is woken
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
    """One pipe. One descriptor holds both ends open, because there are many pipes and none must ever end."""

    def __init__(self, lock: threading.Lock, stream: int) -> None:
        ends = os.pipe()
        try:
            self.fd = os.open(f"/proc/self/fd/{ends[0]}", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(ends[0])
            os.close(ends[1])
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"  # the path by which another process opens the pipe
        self.kept = b""
        self.task: Task | None = None
        self._lock = lock
        self._stream = stream

    def tail(self) -> str:
        """Pass on what has been written, and return the last lines since the task began."""
        with self._lock:
            try:
                data = os.read(self.fd, PIPE_BYTES)
            except BlockingIOError:
                data = b""
            self.kept = (self.kept + data)[-KEPT_BYTES:]
            # A task that is ended writes the stack of each thread; that is for the task's error alone.
            is_ended = self.task is not None and self.task.doomed
            if data and not is_ended:
                pass_on = None if self.task is None else self.task.pass_on
                (pass_on or write_all)(self._stream, data)
            return last_lines(self.kept.decode(errors="replace"))


def write_all(stream: int, data: bytes) -> None:
    """Write bytes to a standard stream of this process; do nothing if it is closed.

    Parameters
    ----------
    stream : int
        Its descriptor.
    data : bytes
    """
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(stream, data) :]


def last_lines(text: str) -> str:
    """Return the last lines of what a worker has written to stderr, which explain why it ended.

    Python's report of a fatal signal keeps its first line, which names the signal. The stack of C functions
    that Python adds from 3.14 on is removed, because it alone may have as many lines as are kept.

    Parameters
    ----------
    text : str

    Returns
    -------
    str
    """
    lines = _C_STACK.sub("", text).splitlines()
    last = lines[-KEPT_LINES:]
    fatal = [line for line in lines[:-KEPT_LINES] if line.startswith(_FATAL)]
    return "\n".join([fatal[-1], *last[1:]] if fatal else last)


_rehearsed = False
_path: str | None = None  # the path of the pipe that is this worker's stderr
_pipe: os.stat_result | None = None  # the status of that pipe, from the worker's second task on


def rehearse() -> None:
    """Set up signal handlers before workers are forked, so that no worker has to do so at its first task."""
    global _rehearsed
    if _rehearsed or sys.platform != "linux":
        return
    _rehearsed = True
    if not faulthandler.is_enabled():
        faulthandler.enable(2)
    faulthandler.register(signal.SIGTERM, 2, chain=True)
    os.register_at_fork(before=_hold_sigterm, after_in_child=_end_quietly, after_in_parent=_heed_sigterm)


_masks = threading.local()  # in the thread that forks: the signals that were blocked before


def _hold_sigterm() -> None:
    """Block SIGTERM until a process that a task forks no longer writes its stacks when it gets SIGTERM."""
    if _path is not None:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _heed_sigterm() -> None:
    """Restore the signals that were blocked before the fork."""
    if _path is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masks.before)


def _end_quietly() -> None:
    """Have forked children of a worker write no stacks at SIGTERM, by which a task ends its children."""
    if _path is not None:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:  # otherwise the task has its own handler
            faulthandler.unregister(signal.SIGTERM)
        _heed_sigterm()


def listen(path: str) -> None:
    """Make a pipe the stderr of this process, a worker; a fatal signal makes it write its stacks there.

    Parameters
    ----------
    path : str
        Path of the pipe, from the message of a task.
    """
    global _path, _pipe
    again = path == _path
    try:
        if again and _pipe is not None and os.path.samestat(_pipe, os.fstat(2)):
            return  # stderr is still the pipe, because no task has replaced it
        pipe = os.open(path, os.O_WRONLY)
        os.dup2(pipe, 2)
        os.close(pipe)
        _pipe = os.fstat(2) if again else None
    except OSError:  # a hardened /proc, or a task has closed descriptors that are not its own
        return
    _path = path
    rehearse()


def redirect_stdout(path: str) -> None:
    """Make a pipe the stdout of this process, a worker.

    Parameters
    ----------
    path : str
        Path of the pipe, from the message of a task.
    """
    with contextlib.suppress(OSError):  # a hardened /proc
        pipe = os.open(path, os.O_WRONLY)
        os.dup2(pipe, 1)
        os.close(pipe)


def unread() -> bool:
    """Return whether the caller may not have read everything that this process, a worker, has written."""
    if _path is None:
        return False
    try:
        return fcntl.ioctl(2, termios.FIONREAD, NOTHING) != NOTHING
    except OSError:  # a task has replaced stderr by something that is not a pipe
        return True
