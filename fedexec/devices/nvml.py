"""Finds and measures NVIDIA's devices through NVML, which starts no CUDA and works before a fork.

This needs ``nvidia-ml-py`` (the extra ``gpu``) and the driver's ``libnvidia-ml.so.1``; both are looked for
at the first use. If the driver stops answering, values are None, and one warning for each device is logged;
no exception is raised.
"""

import ctypes
import itertools
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedexec.devices.device import Device
from fedexec.errors import DeviceError

__all__ = ["NvmlDevice", "devices"]

log = logging.getLogger("fedexec")

_LIBRARY = "libnvidia-ml.so.1"
_END = ("-1", "NoDevFiles")  # names after these are hidden; Slurm writes the second if a job has no GPU
_NO_PIDS = (0, 0xFFFFFFFF)  # no process has such a number


class NvmlDevice(Device):
    """One GPU, or one MIG instance of a GPU.

    Parameters
    ----------
    uuid, name : str
        As NVML reports them.
    """

    def __init__(self, uuid: str, name: str) -> None:
        self.uuid = uuid
        self.name = name
        self._handle: Any = None
        self._pid: int | None = None  # the process in which the handle is valid

    def total_bytes(self) -> int | None:
        """Return the capacity in bytes; None if the driver no longer answers."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.total)

    def used_bytes(self) -> int | None:
        """Return how many bytes are in use, including the driver's own share; None if it does not answer."""
        # `used` includes the driver's share in version 1 but not in version 2, which some systems lack.
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.total) - int(memory.free)

    def process_bytes(self) -> Mapping[int, int] | None:
        """Return how many bytes each computing process holds, by pid.

        A process is missing if the driver does not say how much it holds. In a container the pids may be
        those of the host; :mod:`fedexec.memory.self_usage` finds that out.

        Returns
        -------
        mapping of int to int, or None
            None if the driver does not answer, or if its list cannot be true: early 535 drivers wrote entries
            of another length.
        """
        before = self.used_bytes()
        entries = self._ask("nvmlDeviceGetComputeRunningProcesses")
        after = self.used_bytes()
        if before is None or entries is None or after is None:
            return None
        counts = Counter(entry.pid for entry in entries)
        held = {entry.pid: int(entry.usedGpuMemory) for entry in entries if entry.usedGpuMemory is not None}
        # Compare with the larger value: a process may have begun or ended while the list was read.
        if any(pid in counts for pid in _NO_PIDS) or len(counts) < len(entries):
            mistake = f"it lists the pids {sorted(counts.elements())}"
        elif sum(held.values()) > max(before, after):
            mistake = f"it lists {sum(held.values())} bytes, but {max(before, after)} are in use"
        else:
            return held
        _warn_once(self.uuid + " list", f"{self}: the driver's process list cannot be true: {mistake}")
        return None

    def _ask(self, function: str) -> Any:
        try:
            if self._pid != os.getpid():
                self._handle = _call("nvmlDeviceGetHandleByUUID", self.uuid)
                self._pid = os.getpid()
            return _call(function, self._handle)
        except _SilentError as exc:
            _warn_once(self.uuid, f"{self}: its memory cannot be measured: {exc}")
            return None

    def __str__(self) -> str:
        return f"{self.name} ({self.uuid})"


def devices(choice: str | None, *, named_by: str) -> tuple[NvmlDevice, ...]:
    """Find NVIDIA's devices. If a GPU is in MIG mode, its instances are devices, and the GPU itself is not.

    Parameters
    ----------
    choice : str or None
        A comma-separated list as in ``CUDA_VISIBLE_DEVICES``: indices in NVML's order (which is CUDA's order
        with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``), UUIDs of GPUs and MIG instances, and beginnings of UUIDs that
        only one device has. A GPU in MIG mode stands for all its instances. An empty list and "-1" choose no
        device, None chooses all.
    named_by : str
        The variable that holds the choice, for messages. If it is ``CUDA_VISIBLE_DEVICES``, it may name
        devices although there is no driver or no device: then it was not set for fedexec.

    Returns
    -------
    tuple of NvmlDevice
        In the order of `choice`; empty if there is no driver or no device.

    Raises
    ------
    DeviceError
        A name belongs to no device or to several devices, or a device is named twice, or there is no driver
        or no device.
    """
    names = None if choice is None else _names(choice)
    if names == []:
        return ()
    try:
        gpus, missing, level = _gpus(), "the NVIDIA driver reports no device", logging.INFO
    except _SilentError as exc:
        level = logging.INFO if isinstance(exc, _AbsentError) else logging.WARNING
        gpus, missing = [], str(exc)
    if not gpus:
        if names is not None and named_by != "CUDA_VISIBLE_DEVICES":
            raise DeviceError(f"{named_by}={choice!r} asks for a device, but {missing}")
        log.log(level, "there is no NVIDIA device that can be used: %s", missing)
        return ()
    if names is None:
        return tuple(device for gpu in gpus for device in gpu.devices)
    try:
        return _choose(names, gpus)
    except DeviceError as exc:
        existing = ", ".join(map(str, gpus))
        raise DeviceError(f"{named_by}={choice!r}: {exc}. Devices here: {existing}") from None


def _choose(names: Sequence[str], gpus: Sequence["_Gpu"]) -> tuple[NvmlDevice, ...]:
    """Return the devices that have these names; raise DeviceError with the problem of a wrong name."""
    chosen: dict[str, NvmlDevice] = {}
    for name in names:
        matches = _find(name, gpus)
        if len(matches) > 1:
            raise DeviceError(f"{name!r} is the beginning of the UUIDs of several devices")
        if not any(matches):
            raise DeviceError(f"{name!r} is not the name of a device")
        if any(device.uuid in chosen for device in matches[0]):
            raise DeviceError(f"{name!r} names a device for the second time")
        chosen.update((device.uuid, device) for device in matches[0])
    return tuple(chosen.values())


@dataclass(frozen=True, slots=True)
class _Gpu:
    index: int
    uuid: str
    devices: tuple[NvmlDevice, ...]  # the GPU itself, or its MIG instances

    def __str__(self) -> str:
        uuids = [device.uuid for device in self.devices]
        if uuids == [self.uuid]:
            return f"{self.index} ({self.uuid})"
        return f"{self.index} ({self.uuid}, in MIG mode: {', '.join(uuids) or 'no instance'})"


def _names(choice: str) -> list[str]:
    names = [name.strip() for name in choice.split(",")] if choice.strip() else []
    return list(itertools.takewhile(lambda name: name not in _END, names))


def _find(name: str, gpus: Sequence[_Gpu]) -> list[tuple[NvmlDevice, ...]]:
    """Return the devices with this name; if there are none, those whose UUID begins with it."""
    known = {gpu.uuid: gpu.devices for gpu in gpus}
    known |= {device.uuid: (device,) for gpu in gpus for device in gpu.devices}
    exact = {str(gpu.index): gpu.devices for gpu in gpus} | known
    if name in exact:
        return [exact[name]]
    return [known[uuid] for uuid in known if uuid.startswith(name) and name.startswith(("GPU-", "MIG-"))]


def _gpus() -> list[_Gpu]:
    gpus = []
    for index in range(_call("nvmlDeviceGetCount")):
        try:
            handle = _call("nvmlDeviceGetHandleByIndex", index)
            uuid = _call("nvmlDeviceGetUUID", handle)
            gpus.append(_Gpu(index, uuid, _devices_of(handle, uuid)))
        except _SilentError as exc:  # the count includes GPUs that this process may not use
            _warn_once(f"GPU {index}", f"GPU {index} is not used: {exc}")
    return gpus


def _devices_of(handle: Any, uuid: str) -> tuple[NvmlDevice, ...]:
    name = _call("nvmlDeviceGetName", handle)
    mode = _try("nvmlDeviceGetMigMode", handle)  # most GPUs do not have this mode
    if mode is None or mode[0] != 1:
        return (NvmlDevice(uuid, name),)
    indices = range(_call("nvmlDeviceGetMaxMigDeviceCount", handle))  # some have no instance
    instances = [_try("nvmlDeviceGetMigDeviceHandleByIndex", handle, index) for index in indices]
    return tuple(
        NvmlDevice(_call("nvmlDeviceGetUUID", instance), _try("nvmlDeviceGetName", instance) or f"{name} MIG")
        for instance in instances
        if instance is not None
    )


# ---------------------------------------------------------------- NVML itself


class _SilentError(Exception):
    """NVML does not answer; the message says why."""


class _AbsentError(_SilentError):
    """NVML will never answer, because this is an ordinary machine without a GPU."""


_started_in: int | None = None
_warned: set[str] = set()


def _call(function: str, *args: Any) -> Any:
    """Call a function of pynvml. NVML is started once in each process, and once more in a forked process."""
    global _started_in
    if "pynvml" not in sys.modules and not _driver_is_installed():
        raise _AbsentError(f"there is no NVIDIA driver: {_LIBRARY} is not found")
    try:
        import pynvml  # takes as long as a fifth of an executor's start, so not where it would be of no use
    except ImportError:
        raise _AbsentError("nvidia-ml-py is not installed: pip install 'fedexec[gpu]'") from None
    absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    try:
        # There is no lock, because a fork could leave it locked. NVML may be started twice.
        if _started_in != os.getpid():
            pynvml.nvmlInit()
            _started_in = os.getpid()
        return getattr(pynvml, function)(*args)
    except pynvml.NVMLError as exc:
        kind = _AbsentError if exc.value in absent else _SilentError
        raise kind(f"the NVIDIA driver does not answer ({function}: {exc})") from exc
    except getattr(pynvml, "NVMLLibraryMismatchError", ()) as exc:  # not in the oldest pynvml
        raise _SilentError(f"the NVIDIA driver is too old ({function})") from exc


def _driver_is_installed() -> bool:
    """Return whether the driver's library can be loaded; True where this is not known without pynvml."""
    if sys.platform != "linux":
        return True
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return False
    return True


def _try(function: str, *args: Any) -> Any:
    try:
        return _call(function, *args)
    except _SilentError:
        return None


def _warn_once(subject: str, message: str) -> None:
    if subject not in _warned:
        _warned.add(subject)
        log.warning("%s", message)
