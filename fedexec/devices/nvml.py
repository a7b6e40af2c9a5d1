"""NVIDIA's devices, through NVML: asking starts no CUDA, and is allowed before a fork.

Needs ``nvidia-ml-py`` (the extra ``gpu``) and the driver's ``libnvidia-ml.so.1``; looks for them when asked.
A driver that stops answering gives None and one warning for each device, never an exception.
"""

import itertools
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedexec.devices.device import Device
from fedexec.errors import DeviceError

__all__ = ["NvmlDevice", "devices"]

log = logging.getLogger("fedexec")

_END = ("-1", "NoDevFiles")  # what follows these is hidden; the second is how Slurm says "no GPU"
_NO_PIDS = (0, 0xFFFFFFFF)


class NvmlDevice(Device):
    """One GPU, or one MIG instance of a GPU.

    Parameters
    ----------
    uuid, name : str
        As NVML gives them.
    """

    def __init__(self, uuid: str, name: str) -> None:
        self.uuid = uuid
        self.name = name
        self._handle: Any = None
        self._pid: int | None = None  # the process the handle is good for

    def total_bytes(self) -> int | None:
        """Return its capacity; None if the driver does not answer any more."""
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.total)

    def used_bytes(self) -> int | None:
        """Return what is not free, the driver's own share included; None if the driver does not answer."""
        # `used` counts the driver's share in version 1 and not in version 2, which some systems do not have.
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.total) - int(memory.free)

    def process_bytes(self) -> Mapping[int, int] | None:
        """Return pid to bytes of the processes that compute.

        None if the driver does not answer, or lists what cannot be: early 535 drivers wrote entries of
        another length. A process whose memory it does not tell is not in it. In a container the pids may be
        the host's: :mod:`fedexec.memory.self_usage` finds out.
        """
        before = self.used_bytes()
        entries = self._ask("nvmlDeviceGetComputeRunningProcesses")
        after = self.used_bytes()
        if before is None or entries is None or after is None:
            return None
        counts = Counter(entry.pid for entry in entries)
        held = {entry.pid: int(entry.usedGpuMemory) for entry in entries if entry.usedGpuMemory is not None}
        # Against the larger of the two: a process may have ended, or begun, around the list.
        if any(pid in counts for pid in _NO_PIDS) or len(counts) < len(entries):
            wrong = f"it lists the pids {sorted(counts.elements())}"
        elif sum(held.values()) > max(before, after):
            wrong = f"it lists {sum(held.values())} bytes, of {max(before, after)} in use"
        else:
            return held
        _warn_once(self.uuid + " list", f"{self}: the driver's process list cannot be true: {wrong}")
        return None

    def _ask(self, function: str) -> Any:
        try:
            if self._pid != os.getpid():
                self._handle = _call("nvmlDeviceGetHandleByUUID", self.uuid)
                self._pid = os.getpid()
            return _call(function, self._handle)
        except _SilentError as exc:
            _warn_once(self.uuid, f"{self}: figures of it are unknown: {exc}")
            return None

    def __str__(self) -> str:
        return f"{self.name} ({self.uuid})"


def devices(choice: str | None, *, named_by: str) -> tuple[NvmlDevice, ...]:
    """Find NVIDIA's devices. Where a GPU is in MIG mode, its instances are devices, and it is not.

    Parameters
    ----------
    choice : str or None
        In the form of ``CUDA_VISIBLE_DEVICES``: a comma-separated list of indices in NVML's order (which is
        CUDA's with ``CUDA_DEVICE_ORDER=PCI_BUS_ID``), of UUIDs, of beginnings of UUIDs that only one device
        has, of UUIDs of MIG instances; a GPU in MIG mode stands for all its instances. Empty or "-1" is none,
        None is all.
    named_by : str
        The variable that says so, for messages. ``CUDA_VISIBLE_DEVICES`` may name devices where there is no
        driver or none at all: then nothing was meant for fedexec.

    Returns
    -------
    tuple of NvmlDevice
        In the order of `choice`. Empty where there is nothing to ask.

    Raises
    ------
    DeviceError
        A name is no device's, or several devices', or there twice; or there is nothing to ask.
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
        log.log(level, "no NVIDIA device: %s", missing)
        return ()
    if names is None:
        return tuple(device for gpu in gpus for device in gpu.devices)
    chosen: dict[str, NvmlDevice] = {}
    for name in names:
        found = _find(name, gpus)
        if len(found) > 1:
            problem = "is the beginning of several"
        elif not any(found):
            problem = "is no device"
        elif any(device.uuid in chosen for device in found[0]):
            problem = "is there twice"
        else:
            chosen.update((device.uuid, device) for device in found[0])
            continue
        existing = ", ".join(map(str, gpus))
        raise DeviceError(f"{named_by}={choice!r}: {name!r} {problem}. There are: {existing}")
    return tuple(chosen.values())


@dataclass(frozen=True, slots=True)
class _Gpu:
    index: int
    uuid: str
    devices: tuple[NvmlDevice, ...]  # itself, or its MIG instances

    def __str__(self) -> str:
        uuids = [device.uuid for device in self.devices]
        if uuids == [self.uuid]:
            return f"{self.index} ({self.uuid})"
        return f"{self.index} ({self.uuid}, in MIG mode: {', '.join(uuids) or 'no instance'})"


def _names(choice: str) -> list[str]:
    names = [name.strip() for name in choice.split(",")] if choice.strip() else []
    return list(itertools.takewhile(lambda name: name not in _END, names))


def _find(name: str, gpus: Sequence[_Gpu]) -> list[tuple[NvmlDevice, ...]]:
    """Return what has this name, or a name that begins so."""
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
        except _SilentError as exc:  # the count includes those that this process must not use
            _warn_once(f"GPU {index}", f"GPU {index} is left out: {exc}")
    return gpus


def _devices_of(handle: Any, uuid: str) -> tuple[NvmlDevice, ...]:
    name = _call("nvmlDeviceGetName", handle)
    mode = _try("nvmlDeviceGetMigMode", handle)  # most GPUs have no such mode
    if mode is None or mode[0] != 1:
        return (NvmlDevice(uuid, name),)
    slots = range(_call("nvmlDeviceGetMaxMigDeviceCount", handle))  # some are empty
    instances = [_try("nvmlDeviceGetMigDeviceHandleByIndex", handle, slot) for slot in slots]
    return tuple(
        NvmlDevice(_call("nvmlDeviceGetUUID", instance), _try("nvmlDeviceGetName", instance) or f"{name} MIG")
        for instance in instances
        if instance is not None
    )


# ---------------------------------------------------------------- NVML itself


class _SilentError(Exception):
    """NVML gives no answer; says why."""


class _AbsentError(_SilentError):
    """It never will: an ordinary machine without a GPU."""


_started_in: int | None = None
_warned: set[str] = set()


def _call(function: str, *args: Any) -> Any:
    """Call a function of pynvml; NVML is started once in each process, in a forked one again."""
    global _started_in
    try:
        import pynvml
    except ImportError:
        raise _AbsentError("nvidia-ml-py is not installed: pip install 'fedexec[gpu]'") from None
    absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    try:
        # Without a lock, which a fork could leave locked: NVML may be started twice.
        if _started_in != os.getpid():
            pynvml.nvmlInit()
            _started_in = os.getpid()
        return getattr(pynvml, function)(*args)
    except pynvml.NVMLError as exc:
        kind = _AbsentError if exc.value in absent else _SilentError
        raise kind(f"the NVIDIA driver does not answer ({function}: {exc})") from exc
    except getattr(pynvml, "NVMLLibraryMismatchError", ()) as exc:  # not in the oldest pynvml
        raise _SilentError(f"the NVIDIA driver is too old ({function})") from exc


def _try(function: str, *args: Any) -> Any:
    try:
        return _call(function, *args)
    except _SilentError:
        return None


def _warn_once(subject: str, message: str) -> None:
    if subject not in _warned:
        _warned.add(subject)
        log.warning("%s", message)
