"""Finds the devices that tasks may use, as the user chose them or as the machine has them."""

import os

from fedexec.devices import nvml
from fedexec.devices.device import Device, is_emulated
from fedexec.devices.emulated import emulated_device

__all__ = ["find_devices"]


def find_devices(choice: str | None = None, *, named_by: str = "FEDEXEC_DEVICE") -> tuple[Device, ...]:
    """Find the devices that tasks may use.

    Parameters
    ----------
    choice : str, optional
        ``"none"``; ``"emulated:24GiB"`` (see :mod:`fedexec.devices.emulated.emulated_device`); or, as in
        ``CUDA_VISIBLE_DEVICES``, a comma-separated list of UUIDs or NVML indices. Default: ``FEDEXEC_DEVICE``
        in the environment, else the real devices that ``CUDA_VISIBLE_DEVICES`` leaves.
    named_by : str
        Name of the option that holds the choice, for messages.

    Returns
    -------
    tuple of Device
        Empty if there is no device, or no driver to ask.

    Raises
    ------
    DeviceError
        A device that was asked for does not exist; the message names those that exist.
    """
    choice = (os.environ.get("FEDEXEC_DEVICE", "") if choice is None else choice).strip()
    if choice == "none":
        return ()
    if is_emulated(choice):
        return emulated_device.devices(choice)
    if choice:
        return nvml.devices(choice, named_by=named_by)
    return nvml.devices(os.environ.get("CUDA_VISIBLE_DEVICES"), named_by="CUDA_VISIBLE_DEVICES")
