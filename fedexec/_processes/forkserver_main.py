"""The template's own code: it imports the preload, warms up, and forks workers until the caller is gone.

The caller's side is in :mod:`fedexec._processes.forkserver_client`.
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

from fedexec._channel.unpickling import call_and_keep_globals
from fedexec._processes import fork_fitness, huge_pages
from fedexec._processes.forker import Forker, settle_memory
from fedexec._processes.leaving import (
    ToDoAtExit,
    continue_without_parent,
    end_what_is_left,
    end_with_parent,
)
from fedexec._processes.template_successor import import_quietly, rehearse, silence
from fedexec._system.installed import is_installed_file
from fedexec._system.ownership import VARIABLE
from fedexec._worker import imports
from fedexec._worker.ending import leave
from fedexec._worker.setup import preload, prepare
from fedexec._worker.threads import keep_torch_threads, limit_loaded
from fedexec.errors import PreloadError

__all__ = ["main"]

_util: Any = util  # gives access to underscored names, which type checkers do not know
_process: Any = process
_tracker: Any = resource_tracker._resource_tracker


def main() -> NoReturn:
    """Import what the caller asks for, warm up, report readiness, and fork until the caller is gone."""
    os.environ.pop(VARIABLE, None)  # Processes that tasks start do not belong to fedexec.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    control = socket.socket(fileno=int(sys.argv[1]))
    _end_on_hangup(control, True)
    atexit.register(end_what_is_left, os.getpid())  # registered first, so that it runs last
    request: dict[str, Any] = pickle.load(sys.stdin.buffer)
    _tracker._fd = request["tracker"]  # the caller's, because a tracker of the template would end with it
    spawn.prepare(request["preparation"])
    _util._close_stdin()
    arenas = [] if request["warmup"] is None else huge_pages.reserve_arenas()
    try:
        _import_and_warm_up(request, control)
        keep_torch_threads()
        if request["threads"]:
            limit_loaded(request["threads"])
        prepare()
        service = pickle.loads(request["service"])
        left_to_do = ToDoAtExit()
        if service is not None:
            _become_like_a_worker(request["parent"])
            service.prepare()
    except BaseException as exc:
        _end_on_hangup(control, False)  # The caller closes the connection after the following report.
        if isinstance(exc, _UnfitError):
            _report(control, unfit=exc.reason, module=exc.module)
        else:
            _report(
                control, traceback=exc.traceback if isinstance(exc, PreloadError) else traceback.format_exc()
            )
        leave()
    del arenas
    settle_memory()
    _end_on_hangup(control, False)
    _report(control, ready=os.getpid())
    Forker(control, service, left_to_do, request["threads"]).run()


def _report(control: socket.socket, **fields: object) -> None:
    control.sendall(json.dumps(fields).encode() + b"\n")


def _import_and_warm_up(request: dict[str, Any], control: socket.socket) -> None:
    """Import, warm up, repeat rehearsals; raise _UnfitError if a step makes this process unfit to fork."""
    restore_devices = fork_fitness.show_devices()
    with fork_fitness.no_torch_threads():
        for module in request["modules"]:
            _report(control, doing=module)
            preload([module])
            _require_fitness(module)
        with silence():
            for module in request["learnt"]:
                import_quietly(module)
            imports.learnt.update(request["learnt"])
        if request["warmup"] is not None:
            _report(control, doing=request["warmup_name"])
            before = set(sys.modules)
            call_and_keep_globals(request["warmup"])
            _require_fitness(_users_new_modules(before) or request["warmup_name"])
        for name, call in request["rehearsals"]:
            _report(control, doing=name)
            with silence(), contextlib.suppress(Exception):  # The call succeeded in the previous template.
                rehearse(call)
            _require_fitness(name)
    restore_devices()


def _become_like_a_worker(parent: tuple[str, int]) -> None:
    """Do here what multiprocessing does at the start of each process, so that no worker has to do it."""
    _process._current_process = process.BaseProcess(name=process.current_process().name)
    _process._process_counter = itertools.count(1)
    _process._parent_process = _process._ParentProcess(*parent, None)  # A worker adds its sentinel.


def _end_on_hangup(control: socket.socket, on: bool) -> None:
    """Let the kernel end this process, and what an import has started, by SIGIO when the caller is gone.

    If the kernel refuses that, only this process ends, together with the caller's thread that started it and
    waits for it. With `on` false, SIGIO is off; if this process is stopped when its parent ends, the kernel
    continues it, and it notices by itself that the caller is gone.
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
        # The caller is gone already: it never sends anything to a template that is not ready.
        os._exit(1)


class _UnfitError(Exception):
    """A module has made this process unfit to be forked."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(module, reason)
        self.module, self.reason = module, reason


def _require_fitness(module: str) -> None:
    """Raise _UnfitError if this process is unfit to be forked since `module` was imported."""
    if reason := fork_fitness.why_unfit():
        raise _UnfitError(module, reason)


def _users_new_modules(before: set[str]) -> str:
    """Name the user's own modules that a warm-up has imported, so that a complaint leads to their code."""
    new = [name for name in sys.modules if name not in before and _is_users_own(name)]
    packages = {name.rpartition(".")[0] for name in new}
    return ", ".join(name for name in new if name not in packages)


def _is_users_own(name: str) -> bool:
    """Return whether a module belongs neither to Python nor to an installed package nor to fedexec."""
    file = getattr(sys.modules[name], "__file__", None)
    if file is None or name.partition(".")[0] in ("fedexec", "fedexec_backends"):
        return False
    return not is_installed_file(file)
