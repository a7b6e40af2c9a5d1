"""The state of a process that an import must not change, because other tasks would find it changed.

The child that imports for a template compares the state before and after. The comparison covers only what
belongs to the process and is cheap to read, not the variables of modules.
"""

import contextlib
import gc
import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from fedexec._processes import fork_fitness

__all__ = ["difference", "process_state", "tidied"]

_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]
_DECIMAL_DEFAULT = (28, "ROUND_HALF_EVEN")  # what decimal begins with, if an import is the first to load it
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_VIRTUAL, signal.ITIMER_PROF)


def process_state() -> dict[str, object]:
    """Return the state that must not change.

    Returns
    -------
    dict of str to object
        Each key ends the sentence "it changes ...".
    """
    torch, decimal = sys.modules.get("torch"), sys.modules.get("decimal")
    context = decimal.getcontext() if decimal else None
    return {
        "the working directory": _directory(),
        "the file mode creation mask": _mask(),
        "the start method of processes": _start_method(),
        "which connections are open": {
            file for file in fork_fitness.open_files() if file.startswith("socket:")
        },
        "which files are read, whose position all workers would share": set(_files_with_a_position()),
        "which memory is shared with other processes": _shared_memory(),
        "how signals are handled": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "which signals are blocked": signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        "which alarm is set": [signal.getitimer(timer)[0] > 0 for timer in _TIMERS],
        "its limits": [resource.getrlimit(limit) for limit in _LIMITS],
        "its priority": os.getpriority(os.PRIO_PROCESS, 0),
        "how garbage is collected": (gc.isenabled(), gc.get_threshold()),
        "the precision of decimal numbers": (context.prec, context.rounding) if context else _DECIMAL_DEFAULT,
        "torch's default type": str(getattr(torch, "get_default_dtype", lambda: "torch.float32")()),
    }


def difference(before: dict[str, object]) -> str | None:
    """Return how this process's state differs from an earlier one.

    Parameters
    ----------
    before : dict of str to object
        An earlier result of :func:`process_state`.

    Returns
    -------
    str or None
        "it changes ...", which names the first difference; None if there is none.
    """
    now = process_state()
    for what, value in before.items():
        if now[what] != value:
            return f"it changes {what}"
    return None


@contextlib.contextmanager
def tidied() -> Iterator[None]:
    """Undo, at the end, side effects of a first use that the next use repeats by itself.

    These are the default start method of processes, which a first use fixes, and the lock that tqdm creates
    with its first bar: if a worker were killed while it held an inherited lock, the bars of all other workers
    would stop.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    before = set(_locks_of_tqdm())
    try:
        yield
    finally:
        if chosen is None and _start_method() == multiprocessing.get_all_start_methods()[0]:
            multiprocessing.set_start_method(None, force=True)
        for owner, name in set(_locks_of_tqdm()) - before:
            delattr(owner, name)
        gc.collect()  # Objects without references may still keep files open or mapped.


def _locks_of_tqdm() -> Iterator[tuple[type, str]]:
    """Yield the class (tqdm has several kinds of bars) and the attribute name of each lock of tqdm."""
    if (module := sys.modules.get("tqdm.std")) is None:
        return
    bars = [module.tqdm]
    for bar in bars:
        bars += bar.__subclasses__()
    for owner, names in (
        *((bar, ("_lock",)) for bar in bars),
        (module.TqdmDefaultWriteLock, ("mp_lock", "th_lock")),
    ):
        yield from ((owner, name) for name in names if name in vars(owner))


def _directory() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # The directory has been removed.
        return ""


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _start_method() -> str:
    return multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]


def _files_with_a_position() -> Iterator[str]:
    """Yield the open regular files, except those that are only appended to, and those that are mapped."""
    if not Path("/proc/self/fd").is_dir():
        return
    mapped = Path("/proc/self/maps").read_text()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError, ValueError):  # The descriptor was closed after it was listed.
            if not descriptor.is_file():
                continue
            fdinfo = Path(f"/proc/self/fdinfo/{descriptor.name}").read_text()
            flags = next(int(line.split()[1], 8) for line in fdinfo.splitlines() if line.startswith("flags:"))
            name = str(descriptor.readlink())
            if not flags & os.O_APPEND and f" {name}\n" not in mapped:
                yield name


def _shared_memory() -> set[str]:
    """Return the memory mapped here that several processes can write to (locks, arrays, values)."""
    with contextlib.suppress(OSError):
        mapped = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
        return {" ".join(entry[3:]) for entry in mapped if entry[1].startswith("rw-s")}
    return set()
