"""What the process that asks holds on its device: the worker's side of a task's usage."""

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

LIBRARIES = ("cupy", "jax", "tensorflow")  # that use a device without torch


@dataclass(frozen=True, slots=True)
class OwnDevice:
    """What this process holds on the device it computes on. What was not measured is None.

    Attributes
    ----------
    uuid : str or None
        Of the device.
    held_bytes : int or None
        As the driver counts it, the context included; None too where the driver's list cannot be trusted.
    peak_bytes : int or None
        The most it has held since :func:`reset_peak`: what the driver counts beside the allocator's share,
        and that share's peak.
    torch : AllocatorReading or None
        What torch's allocator says; of an emulated device, the books kept by its rules.
    """

    uuid: str | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    torch: AllocatorReading | None = None


def reset_peak() -> None:
    """Have the peaks begin anew."""
    allocator.reset_peak()
    device = _emulated()
    if device is not None:
        device.reset_peak()


def read() -> OwnDevice:
    """Measure this process. Costs next to nothing where no device was used, milliseconds where one was."""
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
    """Return the emulated device, if one was chosen and can be reached."""
    if not is_emulated(os.environ.get("FEDEXEC_DEVICE", "")):
        return None
    from fedexec.devices.emulated import emulated_device

    try:
        return emulated_device.device()
    except (DeviceError, SettingsError):  # whoever allocates there is told; a measurement says nothing
        return None


def _on_real_device(reading: AllocatorReading | None) -> OwnDevice:
    reserved = reading.reserved_bytes if reading is not None else 0
    for device in _candidates(assigned()):
        listed = device.process_bytes() or {}
        held = listed.get(os.getpid())
        # The process is its own canary: a list that does not show it, or less than torch has reserved in it,
        # speaks of other pids than ours (a container).
        if held is None or held < reserved:
            continue
        growth = (reading.peak_reserved_bytes or 0) - reserved if reading is not None else 0
        return OwnDevice(device.uuid, held, held + max(0, growth), reading)
    candidates = _candidates(assigned())
    return OwnDevice(candidates[0].uuid if len(candidates) == 1 else assigned(), torch=reading)


@cache
def _candidates(uuid: str | None) -> tuple[Device, ...]:
    found = find_devices()
    return tuple(device for device in found if uuid is None or device.uuid == uuid)
