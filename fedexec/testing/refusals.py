"""Makes the kernel refuse system calls by a seccomp filter, as containers and sandboxes do.

A filter stays as long as its process, so use one in a process that is started for this purpose. It works on
Linux on x86_64 only, because a filter identifies system calls by their numbers.
"""

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Callable

__all__ = ["AVAILABLE", "REFUSALS", "add_option", "refuse", "without_warnings"]

AVAILABLE = sys.platform == "linux" and platform.machine() == "x86_64"

FCNTL, MEMFD_CREATE, PIDFD_OPEN = 72, 319, 434
F_SETOWN, F_SETSIG = 8, 10
#: What can be refused -> number of the system call, and its second argument if only that one is refused.
REFUSALS: dict[str, tuple[int, int | None]] = {
    "F_SETOWN": (FCNTL, F_SETOWN),
    "F_SETSIG": (FCNTL, F_SETSIG),
    "memfd_create": (MEMFD_CREATE, None),
    "pidfd_open": (PIDFD_OPEN, None),
}
_WARNINGS = {
    "F_SETOWN": "this system refuses F_SETSIG",
    "F_SETSIG": "this system refuses F_SETSIG",
    "memfd_create": "arrays are copied",
}
_refused: set[str] = set()

AUDIT_ARCH_X86_64 = 0xC000003E
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD | BPF_W | BPF_ABS, BPF_JMP | BPF_JEQ | BPF_K, BPF_RET | BPF_K
NUMBER, ARCHITECTURE, SECOND = 0, 4, 24  # offsets in struct seccomp_data; SECOND: lower half of the argument
ALLOW, REFUSE = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 22, 38, 2


def refuse(name: str, error: str = "EPERM") -> None:
    """Make the kernel refuse a call to this process and to all processes that it starts.

    Parameters
    ----------
    name : str
        A key of `REFUSALS`.
    error : str, optional
        Name of the error that the call raises.

    Raises
    ------
    OSError
        The kernel accepts no filter.
    """
    number, second = REFUSALS[name]
    answer = (RETURN, 0, 0, REFUSE | getattr(errno, error))
    conditions = [(ARCHITECTURE, AUDIT_ARCH_X86_64), (NUMBER, number)]
    if second is not None:
        conditions.append((SECOND, second))
    program = []
    for position, (offset, value) in enumerate(conditions):
        to_the_end = 2 * (len(conditions) - position) - 1  # skips the refusal
        program += [(LOAD, 0, 0, offset), (EQUAL, 0, to_the_end, value)]
    program += [answer, (RETURN, 0, 0, ALLOW)]
    _refused.add(name)
    _load(b"".join(struct.pack("HBBI", *instruction) for instruction in program), len(program))


def add_option(add: Callable[..., object]) -> None:
    """Add ``--refuse`` to a command line.

    Parameters
    ----------
    add : callable
        ``add_argument`` of a parser, or ``addoption`` of pytest's.
    """
    add("--refuse", action="append", default=[], choices=REFUSALS, help="call that the kernel refuses")


def without_warnings(stderr: str) -> str:
    """Return a child's stderr without the warnings that the refusals cause."""
    due = [_WARNINGS[name] for name in _refused if name in _WARNINGS]
    return "".join(line for line in stderr.splitlines(keepends=True) if not any(each in line for each in due))


def _load(code: bytes, length: int) -> None:
    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(Program(length, code)), 0, 0),
    ):
        if libc.prctl(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
