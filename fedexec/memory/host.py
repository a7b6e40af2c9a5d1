"""Measures host memory as the kernel counts it. A value that is unknown is None.

There are three values for a process. *RSS* is its resident memory; it is cheap to read, and counts shared
pages in each process. *PSS* divides shared pages by the number of processes, so it can be added up over
processes; reading it takes milliseconds if torch is loaded. The *peak* is the largest RSS since
:func:`reset_peak`. Compare strategies by the sum of PSS over all processes (:func:`tree_bytes`), because the
template with which workers share pages is part of the cost.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from fedexec._system.available_resources import available_bytes, total_bytes

__all__ = [
    "available_bytes",
    "peak_and_rss",
    "pss_bytes",
    "reset_peak",
    "rss_bytes",
    "total_bytes",
    "tree_bytes",
]


def rss_bytes(pid: int) -> int | None:
    """Return the resident memory (RSS) of a process in bytes.

    Parameters
    ----------
    pid : int

    Returns
    -------
    int or None
        None if the process has ended.
    """
    import psutil  # not in workers, which would take longer to start

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def pss_bytes(pid: int) -> int | None:
    """Return the proportional memory (PSS) of a process in bytes.

    Parameters
    ----------
    pid : int

    Returns
    -------
    int or None
        None if the process has ended, or if the system does not say.
    """
    for name in ("smaps_rollup", "smaps"):  # the second takes longer; it is for Linux before 4.14
        try:
            lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
        except OSError:
            continue
        shares = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
        return sum(shares) * 1024 if shares else None
    return None


def tree_bytes(measure: Callable[[int], int | None] = pss_bytes, root: int | None = None) -> int | None:
    """Return the memory of a process and all its descendants in bytes.

    Parameters
    ----------
    measure : callable
        :func:`pss_bytes` or :func:`rss_bytes`.
    root : int, optional
        Process id. Default: this process.

    Returns
    -------
    int or None
        None if the process itself cannot be measured. A descendant that ends meanwhile counts as 0.
    """
    root = os.getpid() if root is None else root
    total = measure(root)
    if total is None:
        return None
    import psutil

    try:
        descendants = psutil.Process(root).children(recursive=True)
    except psutil.Error:
        return None
    return total + sum(measure(child.pid) or 0 for child in descendants)


def reset_peak() -> bool:
    """Reset the peak of this process; return False if the system cannot do that."""
    try:
        file = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(file, b"5")
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def peak_and_rss() -> tuple[int | None, int | None]:
    """Return the peak and the current RSS of this process in bytes; None for each that is unknown.

    This runs for every task, in a process in which each page that is written to is copied first. Using
    :class:`Path` and lines of text here would cost 90 more pages.
    """
    try:
        file = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None, None if sys.platform == "linux" else rss_bytes(os.getpid())
    try:
        status = os.read(file, 1 << 16)
    finally:
        os.close(file)
    return _bytes_of(b"VmHWM:", status), _bytes_of(b"VmRSS:", status)


def _bytes_of(name: bytes, status: bytes) -> int | None:
    _, _, rest = status.partition(name)
    return int(rest.split(None, 1)[0]) * 1024 if rest else None
