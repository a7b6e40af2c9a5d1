"""What an initializer's arguments may hold besides data: locks, queues and pipes of :mod:`multiprocessing`.

multiprocessing pickles them only while it starts a process, and then for this one process. Workers start at
any time and in any number, so a pipe's end is named here by its place in ``/proc``, where each worker opens
it anew, and a lock by its name.
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

__all__ = ["dumps"]

_WAY_OUT = (
    "Make it with multiprocessing.get_context('spawn'), whose locks and queues have names by which any "
    "process finds them, or use multiprocessing.Manager()."
)


def dumps(obj: object) -> bytes:
    """Pickle with locks, queues and pipes, for any number of workers; by value what a script defines.

    Parameters
    ----------
    obj : object

    Returns
    -------
    bytes
        To be read by :func:`pickle.loads`, while the original lives.

    Raises
    ------
    Exception
        What pickling raises; with a note on what to do where it is about a lock of the context "fork", which
        has no name, or about a socket.
    """
    file = io.BytesIO()
    any_worker: Any = _AnyWorker()
    set_spawning_popen(any_worker)  # Without it they refuse to be pickled.
    try:
        _Pickler(file, protocol=5).dump(obj)
    except RuntimeError as exc:
        if "fork context" in str(exc) or "inheritance" in str(exc):
            exc.add_note(f"fedexec: a worker does not inherit it. {_WAY_OUT}")
        raise
    finally:
        set_spawning_popen(None)
    return file.getvalue()


class _Pickler(Pickler):
    """A pickler that knows multiprocessing's own objects, but not torch's way to share a tensor."""

    @property
    def dispatch_table(self) -> Any:
        known: dict[type, Any] = reduction.ForkingPickler._extra_reducers  # type: ignore[attr-defined]
        ours = {
            kind: reduce for kind, reduce in known.items() if reduce.__module__.startswith("multiprocessing.")
        }
        return Pickler.dispatch_table.new_child(ours)


class _AnyWorker:
    """What multiprocessing takes for the process that it is about to start."""

    @staticmethod
    def duplicate_for_child(fd: int) -> int:
        return fd

    @staticmethod
    def DupFd(fd: int) -> "_InProc":  # noqa: N802
        if stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise RuntimeError(
                "a pipe that goes both ways is a socket, which only one process could inherit: "
                "use two of Pipe(duplex=False)"
            )
        return _InProc(os.getpid(), fd)


class _InProc:
    """A descriptor of another process."""

    def __init__(self, pid: int, fd: int) -> None:
        self.path = f"/proc/{pid}/fd/{fd}"
        self.flags = fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_NONBLOCK)

    def detach(self) -> int:
        """Open it in this process."""
        return os.open(self.path, self.flags | os.O_CLOEXEC)
