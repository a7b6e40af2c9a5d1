"""``fedexec doctor``: what on this machine may spoil a run, and what earlier crashes have left."""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import psutil

from fedexec import __version__
from fedexec._cli.nodes import nodes_of
from fedexec._registry import load_chosen
from fedexec._system import leftovers
from fedexec._system.control_characters import visible
from fedexec._system.sizes import format_size
from fedexec.cluster.versions import differences, versions
from fedexec.devices.discovery import find_devices
from fedexec.errors import (
    BackendUnavailableError,
    DeviceError,
    FedexecError,
    SettingsError,
    UnknownBackendError,
)
from fedexec.interface import Capability
from fedexec.memory import host
from fedexec.settings import FORK_IS_SAFE, Settings, resolve, unknown_variables

__all__ = ["command"]

PORTS = {8080: "fedexec server", 9091: "SuperLink", 9092: "SuperLink", 9093: "SuperLink"}
FLOWER = ((1, 38), (1, 43))  # from, and below; as the extra `flower` in pyproject.toml


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes
    ----------
    about : str
    says : str
    is_wrong : bool
    """

    about: str
    says: str
    is_wrong: bool = False


def command(arguments: argparse.Namespace) -> int:
    """Print what is found; exit code 1 if something is wrong."""
    findings = [
        *_versions(),
        *_variables(),
        *_start_method(),
        *_memory(),
        *_cluster(),
        *_ports(),
        *_leftovers(clean=arguments.clean),
    ]
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.about) for finding in findings)
        for finding in findings:
            line = f"{'!' if finding.is_wrong else ' '} {finding.about:<{width}}  {finding.says}"
            print(visible(line))
    return int(any(finding.is_wrong for finding in findings))


def _versions() -> Iterator[Finding]:
    yield Finding("fedexec", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("flwr", "torch", "loky", "nvidia-ml-py"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "not installed")
            continue
        numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
        if name == "flwr" and not FLOWER[0] <= numbers < FLOWER[1]:
            lowest, above = ("{}.{}".format(*end) for end in FLOWER)
            yield Finding(name, f"{found}: fedexec is tested with flwr >={lowest},<{above}", is_wrong=True)
        else:
            yield Finding(name, found)


def _settings() -> Settings:
    """Return what the environment chooses; a misspelt variable is a finding here, and not a warning."""
    unknown = unknown_variables(os.environ)
    return resolve(environ={name: value for name, value in os.environ.items() if name not in unknown})


def _variables() -> Iterator[Finding]:
    """Look at what the environment says."""
    unknown = unknown_variables(os.environ)
    try:
        load_chosen(_settings())
    except (SettingsError, UnknownBackendError, BackendUnavailableError) as exc:
        yield Finding("environment", str(exc), is_wrong=True)
    for variable, advice in unknown.items():
        yield Finding("environment", f"{variable} is no setting of fedexec; {advice}", is_wrong=True)


def _start_method() -> Iterator[Finding]:
    if FORK_IS_SAFE:
        yield Finding("workers", "are forked from a template that no thread and no CUDA has touched")
    else:
        yield Finding("workers", f"are fresh interpreters: fork is not safe on {sys.platform}")


def _memory() -> Iterator[Finding]:
    available = format_size(host.available_bytes())
    yield Finding("host memory", f"{available} free of {format_size(host.total_bytes())}")
    try:
        found = find_devices()
    except DeviceError as exc:
        yield Finding("devices", str(exc), is_wrong=True)
        return
    if not found:
        yield Finding("devices", "none")
    for device in found:
        total, used = device.total_bytes(), device.used_bytes()
        free = None if total is None or used is None else total - used
        yield Finding(device.name, f"{format_size(free)} free of {format_size(total)}", is_wrong=free is None)


def _cluster() -> Iterator[Finding]:
    """Look at the nodes, if the environment names the backend of a cluster."""
    try:
        settings = _settings()
        is_remote = Capability.REMOTE in load_chosen(settings).capabilities
    except FedexecError:  # told already
        return
    if not is_remote:
        return
    try:
        found = nodes_of(settings)
    except (FedexecError, OSError) as exc:
        yield Finding("cluster", str(exc), is_wrong=True)
        return
    for node in found:
        yield Finding(
            f"node {node.name}", f"{node.slots} tasks at once, {', '.join(node.devices) or 'no device'}"
        )
        for text in differences(versions(), node.versions).values():
            yield Finding(f"node {node.name}", f"has {text}", is_wrong=True)
        for directory in node.missing:
            yield Finding(
                f"node {node.name}", f"does not have {directory}, so it finds no module there", is_wrong=True
            )


def _ports() -> Iterator[Finding]:
    try:
        connections = psutil.net_connections("tcp")
    except (psutil.Error, OSError) as exc:
        yield Finding("ports", f"not known: {exc}")
        return
    for taken in connections:
        port = taken.laddr.port if taken.laddr else None
        if taken.status == psutil.CONN_LISTEN and port in PORTS:
            whose = f"process {taken.pid}" if taken.pid else "another user"
            yield Finding(f"port {port}", f"taken by {whose}; it is the default of {PORTS[port]}")


def _leftovers(*, clean: bool) -> Iterator[Finding]:
    found = leftovers.find()
    for leftover in found:
        if not clean:
            yield Finding("leftover", f"{leftover}: --clean ends it", is_wrong=True)
            continue
        try:
            leftover.remove()
            yield Finding("leftover", f"{leftover}: ended")
        except OSError as exc:
            yield Finding("leftover", f"{leftover}: cannot be ended: {exc.strerror}", is_wrong=True)
    if not found:
        yield Finding("leftovers", "none")
    for kind, paths in leftovers.suspects().items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield Finding(
            "not ours", f"{kind} {min(paths)}{more}: not in use by any process that can be seen; left alone"
        )
