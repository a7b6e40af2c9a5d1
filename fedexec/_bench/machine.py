"""What a benchmark ran on: figures hold for nothing else."""

import functools
import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

from fedexec import __version__
from fedexec._system.available_resources import available_cores
from fedexec._system.sizes import format_size
from fedexec.memory import host

__all__ = ["cpu", "fingerprint", "info", "load", "versions"]

PACKAGES = ("numpy", "torch", "flwr", "loky", "ray", "cloudpickle")


@functools.cache
def cpu() -> str:
    """Return the processor's name, and how many cores of it are ours."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name}, {available_cores()} cores, {format_size(host.total_bytes())}"


@functools.cache
def fingerprint() -> str:
    """Return a name that machines of one make share; it does not tell the host's."""
    facts = (cpu(), platform.system(), platform.release(), platform.machine())
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:8]


def info() -> dict[str, Any]:
    """Return the machine as pytest-benchmark's ``machine_info`` tells it, but for the host's name."""
    return {
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "release": platform.release(),
        "system": platform.system(),
        "cpu": {"brand_raw": cpu(), "count": available_cores()},
    }


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    found = {"fedexec": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def load() -> list[float] | None:
    """Return the load averages, which tell whether the machine was quiet."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None
