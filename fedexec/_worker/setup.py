"""Sets up a worker before its first task: number of threads, preload, initializer."""

from __future__ import annotations

import functools
import os
import pickle
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from fedexec._channel import initargs
from fedexec._channel.messages import Reply, ReplyKind
from fedexec._channel.pickling import send_main_by_value
from fedexec._channel.unpickling import call_and_keep_globals
from fedexec._worker import seeding
from fedexec._worker.ending import end_with_caller, leave_the_callers_group
from fedexec._worker.imports import watch
from fedexec._worker.meter import this_worker
from fedexec._worker.running import failure
from fedexec._worker.threads import THREAD_VARIABLES, limit_threads
from fedexec.devices import device
from fedexec.errors import PreloadError
from fedexec.interface import Hooks
from fedexec.memory import host

if TYPE_CHECKING:
    from fedexec.settings import Settings

__all__ = ["WorkerSetup", "device_environment", "environment", "preload", "prepare", "setup"]


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker needs for its set-up. It can be pickled.

    Attributes
    ----------
    environ : dict of str to str
        Environment variables to set.
    preload : tuple of str
        Modules to import.
    initializer : bytes or None
        The pickled initializer with its arguments; None if there is no initializer.
    """

    environ: dict[str, str]
    preload: tuple[str, ...]
    initializer: bytes | None

    @classmethod
    def of(cls, settings: Settings, hooks: Hooks) -> WorkerSetup:
        """Collect what the settings and hooks ask of a worker.

        Parameters
        ----------
        settings : Settings
        hooks : Hooks

        Returns
        -------
        WorkerSetup
        """
        packed = None
        if isinstance(hooks.initializer, initargs.PackedHook):
            packed = hooks.initializer.data
        elif hooks.initializer is not None:
            packed = initargs.dumps(functools.partial(hooks.initializer, *hooks.initargs))
        return cls(environment(settings), settings.preload, packed)


def environment(settings: Settings) -> dict[str, str]:
    """Return the variables that limit the threads of a worker and name its devices.

    A number of threads that the user has set in the environment stays, unless ``threads_per_worker`` was
    given as well.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    dict of str to str
    """
    chosen = settings.sources.get("threads_per_worker", "default") != "default"
    limit = str(settings.threads_per_worker)
    variables = {name: limit if chosen else os.environ.get(name, limit) for name in THREAD_VARIABLES}
    return variables | device_environment(settings)


def device_environment(settings: Settings) -> dict[str, str]:
    """Return the variables that make a process compute on the chosen devices and see no other device.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    dict of str to str
    """
    variables = {}
    if settings.device is not None:
        variables["FEDEXEC_DEVICE"] = settings.device
        if not device.is_emulated(settings.device):
            variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # NVML's order, to which indices of the user refer
            variables["CUDA_VISIBLE_DEVICES"] = "" if settings.device == "none" else settings.device
    if device.LEDGER_VARIABLE in os.environ:
        variables[device.LEDGER_VARIABLE] = os.environ[device.LEDGER_VARIABLE]
    return variables


def setup(worker_setup: WorkerSetup) -> None:
    """Make this process a worker. If that fails, :func:`run` replies to every task with the failure.

    Parameters
    ----------
    worker_setup : WorkerSetup
    """
    started = time.perf_counter()
    leave_the_callers_group()
    end_with_caller()
    prepare()
    seeding.renew()
    limit_threads(worker_setup.environ)
    try:
        preload(worker_setup.preload)
    except PreloadError as exc:
        payload = pickle.dumps((exc.module, exc.traceback))
        this_worker.failure = pickle.dumps(Reply(ReplyKind.PRELOAD_FAILED, payload, os.getpid()))
        return
    try:
        if worker_setup.initializer is not None:
            call_and_keep_globals(worker_setup.initializer)
    except BaseException as exc:
        this_worker.failure = pickle.dumps(failure(ReplyKind.INITIALIZER_FAILED, exc))
    this_worker.setup_seconds = time.perf_counter() - started
    _, this_worker.idle_bytes = host.peak_and_rss()


def prepare() -> None:
    """Do what each worker needs; a template does this once for all workers that are forked from it."""
    watch()
    send_main_by_value()


def preload(modules: Iterable[str]) -> None:
    """Import modules by name.

    Parameters
    ----------
    modules : iterable of str

    Raises
    ------
    PreloadError
        A module cannot be imported; the error carries the traceback.
    """
    for module in modules:
        try:
            import_module(module)
        except BaseException:
            raise PreloadError(module, traceback.format_exc()) from None
