"""Host memory, as the kernel counts it. Unknown is None.

Three figures for a process: *RSS*, what it has resident, cheap, and counted again in each process that
shares it; *PSS*, its fair share of that, which adds up over processes, and takes milliseconds to read when
torch is loaded; and the *peak* of its RSS since :func:`reset_peak`. Compare strategies by the sum of PSS over
the whole tree (:func:`tree_bytes`): the template that workers share their pages with is part of the price.
"""

import os
from collections.abc import Callable
from pathlib import Path

import psutil

from fedexec._system.machine import available_bytes, total_bytes

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
    """Return the resident set of a process; None when it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def pss_bytes(pid: int) -> int | None:
    """Return the proportional set of a process; None when it is gone, or where the system does not tell."""
    for name in ("smaps_rollup", "smaps"):  # the second, which takes longer, before Linux 4.14
        try:
            lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
        except OSError:
            continue
        shares = [int(line.split()[1]) for line in lines if line.startswith("Pss:")]
        return sum(shares) * 1024 if shares else None
    return None


def tree_bytes(measure: Callable[[int], int | None] = pss_bytes, root: int | None = None) -> int | None:
    """Add up a process and all its descendants.

    Parameters
    ----------
    measure : callable
        :func:`pss_bytes` or :func:`rss_bytes`.
    root : int, optional
        A pid. Default: this process.

    Returns
    -------
    int or None
        None if the root itself cannot be measured; a descendant that ends meanwhile counts nothing.
    """
    root = os.getpid() if root is None else root
    total = measure(root)
    if total is None:
        return None
    try:
        descendants = psutil.Process(root).children(recursive=True)
    except psutil.Error:
        return None
    return total + sum(measure(child.pid) or 0 for child in descendants)


def reset_peak() -> bool:
    """Have this process's peak begin anew; False where the system cannot."""
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
    """Return the peak of this process, and its RSS now.

    Every task asks, in a process whose memory is all copied when it is written to: a :class:`Path`, and lines
    of text, would cost it 90 pages.
    """
    try:
        file = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None, None
    try:
        status = os.read(file, 1 << 16)
    finally:
        os.close(file)
    return _bytes_of(b"VmHWM:", status), _bytes_of(b"VmRSS:", status)


def _bytes_of(name: bytes, status: bytes) -> int | None:
    _, _, rest = status.partition(name)
    return int(rest.split(None, 1)[0]) * 1024 if rest else None
