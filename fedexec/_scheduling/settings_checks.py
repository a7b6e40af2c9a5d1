"""Checks settings against what the machine and the backend can do, when an executor starts."""

import logging
from dataclasses import replace

from fedexec._system.available_resources import open_files
from fedexec._system.setting_values import AUTO
from fedexec.devices.device import Device
from fedexec.devices.discovery import find_devices
from fedexec.errors import SettingsError
from fedexec.interface import Capability
from fedexec.settings import Settings

__all__ = [
    "NO_EFFECT",
    "chosen_devices",
    "configure_logging",
    "for_nodes",
    "require_open_files",
    "uses_limits",
    "warn_of_no_effect",
]

log = logging.getLogger("fedexec")

MOST_ON_NODES = 1000  # tasks at once, each of which needs a thread of the caller
SPARE_DESCRIPTORS = 128  # for results that are kept and for the caller's own files, besides those of workers

NO_EFFECT = "backend %s does not support %s, so this setting has no effect"
_LIMIT_HAS_NO_EFFECT = (
    "%s has no effect on backend %s, because its workers end after one task; set enforce_limits to end tasks "
    "that exceed the limit"
)
_NEEDS = {  # setting -> the capabilities of which the backend must have one for the setting to have an effect
    "timeout": Capability.KILLS_ONE,
    "memory_limit": Capability.RECYCLES | Capability.FRESH_PROCESS,
    "device_memory_limit": Capability.RECYCLES | Capability.FRESH_PROCESS,
    "enforce_limits": Capability.KILLS_ONE,
    "max_tasks_per_child": Capability.STANDS_BY,
    "standby": Capability.STANDS_BY,
    "shared_memory": Capability.SHARES_MEMORY,
    "seed": Capability.ISOLATED,
    "node_backend": Capability.REMOTE,
    "node_workers": Capability.REMOTE,
    "node_timeout": Capability.REMOTE,
    "ray_address": Capability.REMOTE,
    "dask_address": Capability.REMOTE,
}
_OF_REUSED_WORKERS = ("memory_limit", "device_memory_limit")


def chosen_devices(settings: Settings) -> tuple[Device, ...]:
    """Return the devices that the settings choose; an error says which option has named a wrong device.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    tuple of Device
    """
    named_by = settings.given_by("device").removesuffix("=")
    try:
        return find_devices(settings.device, named_by=named_by)
    except SettingsError as exc:
        origin = "" if named_by == "device" else f" ({named_by})"
        raise SettingsError(f"device {exc}{origin}") from None


def for_nodes(settings: Settings) -> Settings:
    """Return the caller's settings for a cluster, each node of which has its own number of workers.

    Parameters
    ----------
    settings : Settings

    Returns
    -------
    Settings
    """
    if settings.auto:
        settings = replace(settings, node_workers=settings.node_workers or AUTO, auto=False)
    elif settings.sources.get("max_workers", "default") != "default":
        return settings
    return replace(settings, max_workers=MOST_ON_NODES)


def require_open_files(settings: Settings, per_worker: int) -> None:
    """Raise SettingsError if the workers need more file descriptors than this process may have.

    Parameters
    ----------
    settings : Settings
    per_worker : int
        Most descriptors that this process has open for each worker.
    """
    needed = max(settings.max_workers, settings.standby) * per_worker
    needed += SPARE_DESCRIPTORS if per_worker else 0
    limit = open_files(needed)
    if limit is not None:
        name = "standby" if settings.standby > settings.max_workers else "max_workers"
        raise SettingsError(
            f"{name}={getattr(settings, name)} needs up to {needed} file descriptors on backend "
            f"{settings.backend!r} ({per_worker} for each worker), and this process may have {limit} "
            f"(ulimit -Hn): lower {name}, raise the limit, or take a backend that needs fewer"
        )


def warn_of_no_effect(settings: Settings, capabilities: Capability) -> None:
    """Warn of each setting that was given but has no effect on the backend.

    Parameters
    ----------
    settings : Settings
    capabilities : Capability
        What the backend guarantees.
    """
    for name in _NEEDS:
        if settings.sources.get(name, "default") == "default":
            continue
        if not capabilities & _NEEDS[name]:
            log.warning(NO_EFFECT, settings.backend, name)
        elif name in _OF_REUSED_WORKERS and not uses_limits(settings, capabilities):
            log.warning(_LIMIT_HAS_NO_EFFECT, name, settings.backend)


def uses_limits(settings: Settings, capabilities: Capability) -> bool:
    """Return whether a memory limit has an effect: workers are reused, or running tasks are ended.

    Parameters
    ----------
    settings : Settings
    capabilities : Capability
        Capabilities of the backend.
    """
    is_reused = Capability.RECYCLES in capabilities or (
        Capability.STANDS_BY in capabilities and settings.max_tasks_per_child > 1
    )
    return settings.enforce_limits or is_reused


def configure_logging(settings: Settings) -> None:
    """Set the level of the logger ``fedexec`` if the settings name one, and have it shown.

    Parameters
    ----------
    settings : Settings
    """
    if settings.log_level is None:
        return
    log.setLevel(settings.log_level)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())
