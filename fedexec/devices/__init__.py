"""Accelerators, seen from outside: how much memory each has, and which process holds how much of it.

Asking never starts a context on a device. The name of an emulated device begins with EMULATED.
"""

from typing import TYPE_CHECKING

from fedexec._system.lazy_names import importer

if TYPE_CHECKING:
    from fedexec.devices.device import Device, hidden
    from fedexec.devices.discovery import find_devices

__all__ = ["Device", "find_devices", "hidden"]

__getattr__ = importer(__name__, {"device": ("Device", "hidden"), "discovery": ("find_devices",)})
