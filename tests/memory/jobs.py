"""Tasks for workers of the memory tests."""

import os
import signal
import time
from typing import Any

from fedexec.devices.emulated import emulated_device


def hold(nbytes, directory=None, keep=False):
    """Take device memory, wait until the directory has a file "go", and tell where and how much all held."""
    device = emulated_device.device()
    block = device.allocate(nbytes)
    if directory is not None:
        (directory / str(os.getpid())).touch()
        while not (directory / "go").exists():
            time.sleep(0.005)
    if keep:
        kept.append(block)
    return device.uuid, device.used_bytes()


kept: list[Any] = []


def touch(nbytes, seconds=0.05):
    """Hold device memory for a while; return the most that all were seen to hold."""
    device = emulated_device.device()
    end = time.monotonic() + seconds
    most = 0
    with device.allocate(nbytes):
        while time.monotonic() < end:
            most = max(most, device.used_bytes() or 0)
            time.sleep(0.002)
    return most


def take_and_die(nbytes):
    emulated_device.device().allocate(nbytes)
    os.kill(os.getpid(), signal.SIGKILL)


def take_as_torch(nbytes):
    import torch

    try:
        emulated_device.device().allocate(nbytes)
    except torch.OutOfMemoryError as exc:
        return str(exc)


def use_host(nbytes, seconds=0.0):
    """Hold host memory for a while."""
    data = bytearray(b"x") * nbytes
    time.sleep(seconds)
    return len(data)


def leak(nbytes):
    """Keep host memory; return what this worker had when the task began, and its pid."""
    from fedexec.memory import host

    before = host.rss_bytes(os.getpid())
    kept.append(bytearray(b"x") * nbytes)
    return before, os.getpid()


def tell_no_device_bytes():
    """Have this worker know what torch reserved and no more, as in a container; and take its time to end."""
    from multiprocessing.util import Finalize

    from fedexec.memory import self_usage
    from fedexec.memory.allocator import AllocatorReading

    def read():
        books = device.allocated_bytes()
        return self_usage.OwnDevice(
            "GPU-untold", torch=AllocatorReading(books, books, books, device.peak_bytes())
        )

    device = emulated_device.device()
    self_usage.read = read
    Finalize(None, time.sleep, (0.4,), exitpriority=0)


def where():
    """Return the device this worker computes on, as CUDA and as the emulation see it."""
    from fedexec.devices.device import assigned

    return assigned(), os.environ.get("CUDA_VISIBLE_DEVICES")
