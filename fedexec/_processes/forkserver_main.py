"""What runs in the template: it imports the preload, warms up, then forks workers until the caller is gone.

The caller's end is :mod:`fedexec._processes.forkserver_client`.
"""

import atexit
import contextlib
import fcntl
import itertools
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from multiprocessing import process, resource_tracker, spawn, util
from multiprocessing.connection import wait
from typing import Any, NoReturn

from fedexec._processes import fitness, huge_pages
from fedexec._processes.forker import Forker, settle_memory
from fedexec._processes.leaving import (
    ToDoAtExit,
    continue_without_parent,
    end_what_is_left,
    end_with_parent,
)
from fedexec._processes.successor import import_quietly, rehearse, silence
from fedexec._system.installed import is_installed_file
from fedexec._system.ownership import VARIABLE
from fedexec._worker import imports
from fedexec._worker.ending import leave
from fedexec._worker.setup import preload, prepare
from fedexec._worker.threads import keep_torch_threads, limit_loaded
from fedexec.errors import PreloadError

__all__ = ["main"]

_util: Any = util  # its underscored names, which type checkers do not know
_process: Any = process
_tracker: Any = resource_tracker._resource_tracker


def main() -> NoReturn:
    """Import what is asked for, warm up, say so, then fork until the caller is gone."""
    os.environ.pop(VARIABLE, None)  # What tasks start is not ours to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    control = socket.socket(fileno=int(sys.argv[1]))
    _end_on_hangup(control, True)
    atexit.register(end_what_is_left, os.getpid())  # the first, so the last to be done
    wanted = pickle.load(sys.stdin.buffer)
    _tracker._fd = wanted["tracker"]  # the caller's: one of this process's own would end with it
    spawn.prepare(wanted["preparation"])
    _util._close_stdin()
    arenas = [] if wanted["warmup"] is None else huge_pages.reserve_arenas()

    def tell(**report: object) -> None:
        control.sendall(json.dumps(report).encode() + b"\n")

    try:
        put_back = fitness.show_devices()
        with fitness.no_torch_threads():
            for module in wanted["modules"]:
                tell(doing=module)
                preload([module])
                _require_fitness(module)
            with silence():
                for module in wanted["learnt"]:
                    import_quietly(module)
                imports.learnt.update(wanted["learnt"])
            if wanted["warmup"] is not None:
                tell(doing=wanted["warmup_name"])
                before = set(sys.modules)
                pickle.loads(wanted["warmup"])()
                _require_fitness(_whose(before) or wanted["warmup_name"])
            for name, call in wanted["rehearsals"]:
                tell(doing=name)
                with silence(), contextlib.suppress(Exception):  # It went well before
                    rehearse(call)
                _require_fitness(name)
        put_back()
        keep_torch_threads()
        if wanted["threads"]:
            limit_loaded(wanted["threads"])
        prepare()
        service = pickle.loads(wanted["service"])
        left_to_do = ToDoAtExit()
        if service is not None:
            _become_like_a_worker(wanted["parent"])
            service.prepare()
    except BaseException as exc:
        _end_on_hangup(control, False)  # The caller hangs up when it has heard this.
        if isinstance(exc, _UnfitError):
            tell(unfit=exc.reason, module=exc.module)
        else:
            tell(traceback=exc.traceback if isinstance(exc, PreloadError) else traceback.format_exc())
        leave()
    del arenas
    settle_memory()
    _end_on_hangup(control, False)
    tell(ready=os.getpid())
    Forker(control, service, left_to_do, wanted["threads"]).run()


def _become_like_a_worker(parent: tuple[str, int]) -> None:
    """Do here what multiprocessing does in each new process before its work: workers are born so."""
    _process._current_process = process.BaseProcess(name=process.current_process().name)
    _process._process_counter = itertools.count(1)
    _process._parent_process = _process._ParentProcess(*parent, None)  # a worker adds its sentinel


def _end_on_hangup(control: socket.socket, on: bool) -> None:
    """Have the kernel end this process, and what an import has started, (SIGIO) when the caller is gone.

    Where that is refused this process alone ends, with the thread that has started it and waits for it. Off,
    it is continued then if it is stopped: it sees by itself that the caller is gone.
    """
    try:
        fcntl.fcntl(control, fcntl.F_SETOWN, -os.getpgrp())
        flags = fcntl.fcntl(control, fcntl.F_GETFL)
        fcntl.fcntl(control, fcntl.F_SETFL, flags | os.O_ASYNC if on else flags & ~os.O_ASYNC)
    except OSError:
        if on:
            end_with_parent()
    if not on:
        continue_without_parent()
    if on and wait([control], 0):  # `select.select` refuses descriptors above 1,023
        os._exit(1)  # nothing is ever sent to a template that is not ready: the caller is gone already


class _UnfitError(Exception):
    """A module has made this process unfit to be forked."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(module, reason)
        self.module, self.reason = module, reason


def _require_fitness(module: str) -> None:
    """Raise _UnfitError if this process is unfit to be forked since `module` was imported."""
    if reason := fitness.why_unfit():
        raise _UnfitError(module, reason)


def _whose(before: set[str]) -> str:
    """Name the user's own modules that a warm-up has imported, so that a complaint leads to them."""
    new = [name for name in sys.modules if name not in before and _is_users_own(name)]
    packages = {name.rpartition(".")[0] for name in new}
    return ", ".join(name for name in new if name not in packages)


def _is_users_own(name: str) -> bool:
    """Return whether a module is neither Python's nor installed nor ours."""
    file = getattr(sys.modules[name], "__file__", None)
    if file is None or name.partition(".")[0] in ("fedexec", "fedexec_backends"):
        return False
    return not is_installed_file(file)
