"""Measures what this process holds on its device: the device part of the usage of a task."""

import os
import sys
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from fedexec.devices.device import Device, assigned, is_emulated
from fedexec.devices.discovery import find_devices
from fedexec.errors import DeviceError, SettingsError
from fedexec.memory import allocator
from fedexec.memory.allocator import AllocatorReading

if TYPE_CHECKING:
    from fedexec.devices.emulated.emulated_device import EmulatedDevice

__all__ = ["OwnDevice", "read", "reset_peak"]

LIBRARIES = ("cupy", "jax", "tensorflow")  # libraries that use a device without torch


@dataclass(frozen=True, slots=True)
class OwnDevice:
    """What this process holds on the device on which it computes. A value that was not measured is None.

    Attributes
    ----------
    uuid : str or None
        UUID of the device.
    held_bytes : int or None
        Bytes as the driver counts them, including the context; None also if the driver's list of processes
        cannot be trusted.
    peak_bytes : int or None
        The most bytes held since :func:`reset_peak`: what the driver counts besides the allocator's memory,
        plus the peak of the allocator's memory.
    torch : AllocatorReading or None
        Values of torch's allocator; for an emulated device, the values that the emulation computes.
    """

    uuid: str | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    torch: AllocatorReading | None = None


def reset_peak() -> None:
    """Reset the peaks of this process."""
    allocator.reset_peak()
    device = _emulated()
    if device is not None:
        device.reset_peak()


def read() -> OwnDevice:
    """Measure this process.

    This costs almost nothing if no device was used, and milliseconds if one was.

    Returns
    -------
    OwnDevice
    """
    device = _emulated()
    if device is not None:
        held, peak = device.held_bytes(), device.peak_bytes()
        context = device.context_bytes if peak else 0
        books = AllocatorReading(
            device.allocated_bytes(), max(0, held - context), peak_reserved_bytes=peak - context
        )
        return OwnDevice(device.uuid, held, peak, books)
    if is_emulated(os.environ.get("FEDEXEC_DEVICE", "")):
        return OwnDevice()
    reading = allocator.read()
    if reading is None and not any(name in sys.modules for name in LIBRARIES):
        return OwnDevice()
    return _on_real_device(reading)


def _emulated() -> "EmulatedDevice | None":
    """Return the emulated device if one is chosen and exists, else None."""
    if not is_emulated(os.environ.get("FEDEXEC_DEVICE", "")):
        return None
    from fedexec.devices.emulated import emulated_device

    try:
        return emulated_device.device()
    except (DeviceError, SettingsError):  # a task that uses the device gets this error itself
        return None


def _on_real_device(reading: AllocatorReading | None) -> OwnDevice:
    reserved = reading.reserved_bytes if reading is not None else 0
    for device in _candidates(assigned()):
        listed = device.process_bytes() or {}
        held = listed.get(os.getpid())
        # Check the driver's list with this process: if the list lacks it, or says less than torch has
        # reserved in it, then the pids in the list are those of the host and not of this container.
        if held is None or held < reserved:
            continue
        growth = (reading.peak_reserved_bytes or 0) - reserved if reading is not None else 0
        return OwnDevice(device.uuid, held, held + max(0, growth), reading)
    candidates = _candidates(assigned())
    return OwnDevice(candidates[0].uuid if len(candidates) == 1 else assigned(), torch=reading)


@cache
def _candidates(uuid: str | None) -> tuple[Device, ...]:
    devices = find_devices()
    return tuple(device for device in devices if uuid is None or device.uuid == uuid)
