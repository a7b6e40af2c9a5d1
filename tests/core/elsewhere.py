"""Take away from this interpreter, a Linux one, what Python has not on another system. Imported first of all.

What is imported before is the standard library's and psutil's own business; what is imported after it sees
the system that :func:`pretend` names. It shows what can be seen so, and is no test on that system.
"""

import errno
import importlib
import os
import sys
import types

# Of `signal`: all else that is named like a signal goes.
SIGNALS_OF_WINDOWS = "SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN"
NOT_OF_WINDOWS = {
    "os": (
        "fork forkpty killpg waitid wait wait3 wait4 setpgid getpgrp getpgid setsid "
        "register_at_fork geteuid getuid getgid O_CLOEXEC O_NONBLOCK O_ASYNC O_ACCMODE pidfd_open "
        "memfd_create MFD_CLOEXEC posix_spawn sysconf sched_getaffinity sched_yield "
        "WNOHANG WEXITED WNOWAIT WIFSIGNALED WTERMSIG P_PID P_ALL CLD_KILLED "
        "CLD_DUMPED openpty uname mkfifo posix_fallocate eventfd"
    ),
    "signal": (
        "pthread_sigmask setitimer sigwait sigpending sigtimedwait SIG_BLOCK SIG_UNBLOCK "
        "SIG_SETMASK siginterrupt alarm pause"
    ),
    "mmap": "MAP_SHARED MAP_PRIVATE MAP_ANONYMOUS MAP_POPULATE PROT_READ PROT_WRITE",
    "select": "poll epoll",
    "faulthandler": "register unregister",
    "socket": "AF_UNIX SO_PEERCRED send_fds recv_fds",
    "time": "clock_gettime CLOCK_MONOTONIC",
}
NO_MODULES_OF_WINDOWS = (
    "fcntl resource termios pwd grp multiprocessing.popen_fork multiprocessing.popen_forkserver "
    "multiprocessing.popen_spawn_posix multiprocessing.forkserver"
)
NOT_OF_OLD_MACOS = {
    "os": (
        "waitid P_PID P_ALL WEXITED WNOWAIT pidfd_open memfd_create MFD_CLOEXEC sched_getaffinity "
        "pipe2 eventfd"
    ),
    "mmap": "MAP_POPULATE",
    "select": "epoll",
    "socket": "SO_PEERCRED",
    "fcntl": "F_SETSIG F_GETPIPE_SZ F_SETPIPE_SZ F_OFD_SETLK F_OFD_SETLKW F_OFD_GETLK",
}
NO_DIRECTORIES_OF_MACOS = ("/proc", "/sys", "/dev/shm")
USED = (
    "argparse atexit concurrent.futures ctypes email faulthandler functools importlib.metadata "
    "ipaddress json logging mmap multiprocessing multiprocessing.managers "
    "multiprocessing.queues multiprocessing.reduction multiprocessing.resource_tracker "
    "multiprocessing.spawn multiprocessing.synchronize pathlib pickle random select selectors "
    "shutil signal socket ssl subprocess tempfile threading traceback urllib.request uuid "
    "cloudpickle numpy psutil threadpoolctl"
)


def pretend(platform):
    """Be that system from now on: "win32" or "darwin"."""
    for name in USED.split():
        importlib.import_module(name)
    gone = NOT_OF_WINDOWS if platform == "win32" else NOT_OF_OLD_MACOS
    for module, names in gone.items():
        for name in names.split():
            vars(importlib.import_module(module)).pop(name, None)
    if platform == "win32":
        _leave_windows_signals()
        _have_no_library_of_everything()
        for name in NO_MODULES_OF_WINDOWS.split():
            sys.modules[name] = None  # type: ignore[assignment]  # an import of it fails
    else:
        _start_interpreters()
        _refuse_to_signal_zombies()
        _hide_files()
    if hasattr(os, "process_cpu_count"):  # as it is where there is no sched_getaffinity
        os.process_cpu_count = os.cpu_count
    sys.platform = platform


def _leave_windows_signals():
    signal = sys.modules["signal"]
    kept = SIGNALS_OF_WINDOWS.split()
    for name in [name for name in vars(signal) if name.startswith("SIG") and name not in kept]:
        delattr(signal, name)


def _have_no_library_of_everything():
    ctypes = sys.modules["ctypes"]
    load = ctypes.CDLL.__init__

    def init(self, name, *arguments, **options):
        if name is None:
            raise TypeError("expected str, bytes or os.PathLike object, not NoneType")
        load(self, name, *arguments, **options)

    ctypes.CDLL.__init__ = init


def _start_interpreters():
    """Let multiprocessing start processes by "spawn" unless it is told otherwise."""
    context = sys.modules["multiprocessing.context"]
    context._default_context._default_context = context._concrete_contexts["spawn"]


def _refuse_to_signal_zombies():
    """Let os.killpg leave zombies out, as macOS does: a group of nothing else may not be signalled."""
    psutil = sys.modules["psutil"]
    send = os.killpg

    def is_alive(pid, group):
        try:
            return os.getpgid(pid) == group and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except (ProcessLookupError, psutil.NoSuchProcess):
            return False

    def killpg(pgid, number):
        group = pgid or os.getpgrp()
        send(group, 0)  # raises ProcessLookupError if there is no such group
        if not any(is_alive(pid, group) for pid in (group, *psutil.pids())):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        send(group, number)

    os.killpg = killpg


def _hide_files():
    """Let only psutil find files of Linux; on macOS it finds out the same without them."""
    psutil = os.path.dirname(importlib.import_module("psutil").__file__ or "")  # noqa: PTH120 (asks no os.stat)

    def is_hidden(path):
        if not isinstance(path, (str, bytes, os.PathLike)):
            return False
        if not os.fsdecode(path).startswith(NO_DIRECTORIES_OF_MACOS):
            return False
        frame: types.FrameType | None = sys._getframe(2)
        while frame is not None and not frame.f_code.co_filename.startswith(psutil):
            frame = frame.f_back
        return frame is None

    def refuse(event, arguments):
        if event in ("open", "os.listdir", "os.scandir") and is_hidden(arguments[0]):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), arguments[0])

    def hiding(look):
        def look_elsewhere(path, *arguments, **options):
            if is_hidden(path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return look(path, *arguments, **options)

        return look_elsewhere

    sys.addaudithook(refuse)
    for name in ("stat", "lstat", "readlink"):
        setattr(os, name, hiding(getattr(os, name)))
