"""``fedexec probe``: run one task, measure it, and say how many of them this machine holds at once."""

import argparse
import contextlib
import functools
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedexec._cli import options
from fedexec._cli.output import stdout_as_stderr
from fedexec._cli.signals import Ending
from fedexec._cli.user_task import load_own_task
from fedexec._scheduling.admission import Footprint
from fedexec._system.available_resources import available_cores
from fedexec._system.control_characters import visible
from fedexec._system.error_text import one_line
from fedexec._system.find_by_name import split_name
from fedexec._system.sizes import format_size
from fedexec._workload import jobs
from fedexec._workload.data import DataSpec
from fedexec.errors import DeviceError, FedexecError
from fedexec.executor import Executor
from fedexec.interface import Hooks
from fedexec.memory import host
from fedexec.settings import Settings, resolve

__all__ = ["command"]

REPEAT = 3  # the largest counts
MIB = 1 << 20


def command(arguments: argparse.Namespace) -> int:
    """Print what was measured."""
    settings = _settings(arguments)
    if arguments.calibrate:
        print(visible(_calibrate(settings)))
        return 0
    with stdout_as_stderr() if arguments.json else contextlib.nullcontext():
        task = _own_task(arguments) or _built_in(arguments)
        found = _measure(task, settings, arguments.ending)
    print(json.dumps(found, indent=2) if arguments.json else visible(_text(found), lines=True))
    return 0


@dataclass(frozen=True)
class _Task:
    name: str
    fn: Callable[..., object]
    preload: tuple[str, ...]
    arguments: tuple[Any, ...] = ()


def _settings(arguments: argparse.Namespace) -> Settings:
    flags = options.executor_flags(arguments)
    if flags.setdefault("max_workers", "auto") != "auto":
        raise options.UsageError("--max-workers is what `fedexec probe` finds out: leave it away")
    return resolve(flags=flags)


def _own_task(arguments: argparse.Namespace) -> _Task | None:
    own = load_own_task(arguments.task, arguments.arguments)
    if own is None:
        return None
    names, job, args = own
    return _Task(names.task, job.fn, (split_name(names.task)[0],), args)


def _built_in(arguments: argparse.Namespace) -> _Task:
    if importlib.util.find_spec("torch") is None:
        raise FedexecError(
            "the built-in job needs torch: pip install 'fedexec[demo]'. Or name a task of yours: --task"
        )
    data = options.data_spec(arguments)
    return _Task("the built-in job's fit", functools.partial(_fit, data), jobs.PRELOAD)


def _fit(data: DataSpec) -> None:
    config = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02, "server_round": 1}
    jobs.train(jobs.prepare(data), config, data=data, client=0)


def _measure(task: _Task, settings: Settings, ending: Ending) -> dict[str, Any]:
    if settings.sources["preload"] == "default":
        settings = replace(settings, preload=task.preload)
    with Executor(settings, Hooks()) as executor:
        ending.prepare(stop=executor.kill_workers)
        for _ in range(REPEAT):
            future = executor.submit(task.fn, *task.arguments)
            error = future.exception()
            if error is not None:
                ending.settle()
                raise FedexecError(f"{task.name} failed: {one_line(error)}") from error
        (footprint,) = executor.footprints().values()
        seconds = future.usage.wall_seconds if future.usage else None
        devices = [
            {"uuid": device.uuid, "name": device.name, "total_bytes": device.total_bytes()}
            for device in executor.devices
        ]
    return {
        "task": task.name,
        "backend": settings.backend,
        "seconds": seconds,
        "host_bytes": footprint.host_bytes,
        "host_total_bytes": host.total_bytes(),
        "device_bytes": footprint.device_bytes,
        "devices": devices,
        "cores": available_cores(),
        "at_once": footprint.at_once,
        "client_resources": _client_resources(footprint, len(devices)),
    }


def _client_resources(footprint: Footprint, devices: int) -> dict[str, float | None]:
    """Return what gives Flower's engine as many clients at once; fractions are cut, never rounded up.

    What a task takes of a GPU that tells nothing is None.
    """
    assert footprint.at_once is not None
    cpus = available_cores() / footprint.at_once
    resources: dict[str, float | None] = {"num_cpus": math.floor(cpus) if cpus >= 1 else _cut(cpus)}
    if footprint.device_bytes:
        resources["num_gpus"] = _cut(1 / math.ceil(footprint.at_once / devices))
    else:
        resources["num_gpus"] = None if devices and footprint.device_bytes is None else 0
    return resources


def _cut(fraction: float) -> float:
    return math.floor(fraction * 10_000) / 10_000  # Ray knows no finer ones


def _text(found: dict[str, Any]) -> str:
    lines = [f"{found['task']}, on {found['backend']}, the largest of {REPEAT} runs:"]
    lines.append(
        f"  takes {format_size(found['host_bytes'])} of the host's {format_size(found['host_total_bytes'])}"
    )
    for device in found["devices"]:
        lines.append(
            f"  takes {format_size(found['device_bytes'])} of the {format_size(device['total_bytes'])} "
            f"of {device['name']}"
        )
    if not found["devices"]:
        lines.append("  device memory: not measured, there is no device")
    machine = "this machine"
    if any(device["uuid"].startswith("EMULATED") for device in found["devices"]):
        machine += ", were its EMULATED device real,"
    lines.append(f"{machine} holds {found['at_once']} of them at once ({found['cores']} cores)")
    resources = json.dumps(found["client_resources"])
    lines.append(f"the same for Flower's simulation engine: client_resources={resources}")
    return "\n".join(lines)


def _calibrate(settings: Settings) -> str:
    """Return how the first GPU is to be emulated."""
    with Executor(settings, Hooks()) as executor:
        if not executor.devices or executor.devices[0].is_emulated:
            raise DeviceError("there is no real GPU to calibrate with: run this on a machine that has one")
        (device, *_) = executor.devices
        future = executor.submit(jobs.start_device)
        future.result()
        (footprint,) = executor.footprints().values()
        reserved = future.usage.peak_reserved_bytes if future.usage else None
        total = device.total_bytes()
    if not footprint.device_bytes or total is None:
        raise DeviceError(f"{device.name}: the driver does not tell what a process holds")
    context = footprint.device_bytes - (reserved or 0)
    return f"emulated:{total // MIB}MiB,context={-(-context // MIB)}MiB"
