"""Pickles an initializer's arguments, which may hold locks, queues and pipes of :mod:`multiprocessing`.

multiprocessing pickles such objects only while it starts a process, and only for that process. Workers start
at any time and in any number. So the pickle names the end of a pipe by its path in ``/proc``, which each
worker opens anew, and a lock by the lock's name.
"""

import io
import os
import stat
import sys
from multiprocessing import reduction
from multiprocessing.context import set_spawning_popen
from typing import Any

if sys.platform != "win32":
    import fcntl

from fedexec._channel.pickling import Pickler
from fedexec._channel.unpickling import loads

__all__ = ["PackedHook", "dumps"]

_PACKAGE = "multiprocessing."
_ADVICE = (
    "Make it with multiprocessing.get_context('spawn'), whose locks and queues have names by which any "
    "process finds them, or use multiprocessing.Manager()."
)


class PackedHook:
    """An initializer or a warm-up that another process has pickled.

    Parameters
    ----------
    data : bytes
        The pickled function without parameters.
    name : str, optional
        Module and name of the function, for messages.
    """

    def __init__(self, data: bytes, name: str = "") -> None:
        self.data = data
        if name:
            self.__module__, _, self.__qualname__ = name.partition(".")

    def __call__(self) -> object:
        """Unpickle the function, in a worker or a template, and call it."""
        return loads(self.data)()


def dumps(obj: object) -> bytes:
    """Pickle an object that may hold locks, queues and pipes, so that any number of workers can unpickle it.

    What the script itself defines (``__main__``) is pickled by value.

    Parameters
    ----------
    obj : object

    Returns
    -------
    bytes
        For :func:`pickle.loads`, as long as the original objects exist.

    Raises
    ------
    Exception
        Whatever pickling raises. If the reason is a lock of the context "fork", which has no name, or a
        socket, a note says what to do.
    """
    file = io.BytesIO()
    any_worker: Any = _AnyWorker()
    set_spawning_popen(any_worker)  # otherwise these objects refuse to be pickled
    try:
        _Pickler(file, protocol=5).dump(obj)
    except RuntimeError as exc:
        if "fork context" in str(exc) or "inheritance" in str(exc):
            exc.add_note(f"fedexec: a worker does not inherit this object. {_ADVICE}")
        raise
    finally:
        set_spawning_popen(None)
    return file.getvalue()


class _Pickler(Pickler):
    """Pickles multiprocessing's own objects, but does not share tensors as torch.multiprocessing does."""

    @property
    def dispatch_table(self) -> Any:
        reducers: dict[type, Any] = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        own = {cls: reduce for cls, reduce in reducers.items() if reduce.__module__.startswith(_PACKAGE)}
        return Pickler.dispatch_table.new_child(own)


class _AnyWorker:
    """Stands for the process that multiprocessing believes it is about to start."""

    @staticmethod
    def duplicate_for_child(fd: int) -> int:
        return fd

    @staticmethod
    def DupFd(fd: int) -> "_InProc":  # noqa: N802
        opened_by = _InProc(os.getpid(), fd)
        if not os.path.exists(opened_by.path):  # noqa: PTH110
            raise RuntimeError(
                "workers find queues, pipes and shared values in /proc, which this system does not have: "
                "use multiprocessing.Manager()"
            )
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise RuntimeError(
                "a pipe that goes both ways is a socket, which only one process could inherit: "
                "use two of Pipe(duplex=False)"
            )
        return opened_by


class _InProc:
    """A file descriptor of another process."""

    def __init__(self, pid: int, fd: int) -> None:
        self.path = f"/proc/{pid}/fd/{fd}"
        self.flags = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK)

    def detach(self) -> int:
        """Open the file of the descriptor in this process, and return its descriptor here."""
        return os.open(self.path, self.flags | os.O_CLOEXEC)
