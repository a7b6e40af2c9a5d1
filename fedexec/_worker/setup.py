"""What a worker does before its first task: it limits its threads, preload, initializer."""

import os
import pickle
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module

from fedexec._channel import initargs
from fedexec._channel.messages import Reply, ReplyKind
from fedexec._channel.pickling import send_main_by_value
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
from fedexec.settings import Settings

__all__ = ["WorkerSetup", "device_environment", "environment", "preload", "prepare", "setup"]


@dataclass(frozen=True, slots=True)
class WorkerSetup:
    """What a worker does before its first task."""

    environ: dict[str, str]
    preload: tuple[str, ...]
    initializer: bytes | None

    @classmethod
    def of(cls, settings: Settings, hooks: Hooks) -> "WorkerSetup":
        """Pack what is asked of a worker."""
        packed = initargs.dumps((hooks.initializer, hooks.initargs)) if hooks.initializer else None
        return cls(environment(settings), settings.preload, packed)


def environment(settings: Settings) -> dict[str, str]:
    """Return the variables that hold a worker to its share of the cores and tell it of its device.

    A number of threads that the user has set stays, unless ``threads_per_worker`` was given as well.
    """
    chosen = settings.sources.get("threads_per_worker", "default") != "default"
    limit = str(settings.threads_per_worker)
    wanted = {name: limit if chosen else os.environ.get(name, limit) for name in THREAD_VARIABLES}
    return wanted | device_environment(settings)


def device_environment(settings: Settings) -> dict[str, str]:
    """Return the variables that have a process compute on the chosen devices and see no other."""
    wanted = {}
    if settings.device is not None:
        wanted["FEDEXEC_DEVICE"] = settings.device
        if not device.is_emulated(settings.device):
            wanted["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # NVML's, by which an index was meant
            wanted["CUDA_VISIBLE_DEVICES"] = "" if settings.device == "none" else settings.device
    if device.LEDGER_VARIABLE in os.environ:
        wanted[device.LEDGER_VARIABLE] = os.environ[device.LEDGER_VARIABLE]
    return wanted


def setup(wanted: WorkerSetup) -> None:
    """Make this process a worker. A failure is kept, and answers every task that :func:`run` is given."""
    started = time.perf_counter()
    leave_the_callers_group()
    end_with_caller()
    prepare()
    seeding.renew()
    limit_threads(wanted.environ)
    try:
        preload(wanted.preload)
    except PreloadError as exc:
        payload = pickle.dumps((exc.module, exc.traceback))
        this_worker.failure = pickle.dumps(Reply(ReplyKind.PRELOAD_FAILED, payload, os.getpid()))
        return
    try:
        if wanted.initializer is not None:
            fn, args = pickle.loads(wanted.initializer)
            fn(*args)
    except BaseException as exc:
        this_worker.failure = pickle.dumps(failure(ReplyKind.INITIALIZER_FAILED, exc))
    this_worker.setup_seconds = time.perf_counter() - started
    _, this_worker.idle_bytes = host.peak_and_rss()


def prepare() -> None:
    """Do what each worker needs, and need not do if the process that it is forked from has done it."""
    watch()
    send_main_by_value()


def preload(modules: Iterable[str]) -> None:
    """Import modules by name.

    Raises
    ------
    PreloadError
        One of them cannot be imported; carries its traceback.
    """
    for module in modules:
        try:
            import_module(module)
        except BaseException:
            raise PreloadError(module, traceback.format_exc()) from None
