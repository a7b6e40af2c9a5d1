"""Settings held to what a machine and a backend can do: what cannot be is refused, or said, at the start."""

import logging

from fedexec._system.machine import open_files
from fedexec.devices.device import Device
from fedexec.devices.discovery import find_devices
from fedexec.errors import SettingsError
from fedexec.interface import Capability
from fedexec.settings import Settings

__all__ = ["NOT_KEPT", "chosen_devices", "require_open_files", "uses_limits", "warn_of_no_effect"]

log = logging.getLogger("fedexec")

SPARE_DESCRIPTORS = 128  # beside those of workers: of results that are kept, and the caller's own

NOT_KEPT = "backend %s cannot keep %s: it is not enforced"
_CHANGES_NOTHING = (
    "%s changes nothing on backend %s, whose workers end after one task; enforce_limits ends who exceeds it"
)
_NEEDS = {  # setting -> the promises of which one must be made for it to hold
    "timeout": Capability.KILLS_ONE,
    "memory_limit": Capability.RECYCLES | Capability.FRESH_PROCESS,
    "device_memory_limit": Capability.RECYCLES | Capability.FRESH_PROCESS,
    "enforce_limits": Capability.KILLS_ONE,
    "max_tasks_per_child": Capability.STANDS_BY,
    "standby": Capability.STANDS_BY,
    "shared_memory": Capability.SHARES_MEMORY,
    "seed": Capability.ISOLATED,
}
_OF_REUSED_WORKERS = ("memory_limit", "device_memory_limit")


def chosen_devices(settings: Settings) -> tuple[Device, ...]:
    """Return the devices that were chosen; where there are no such, the error tells who has named them."""
    named_by = settings.given_by("device").removesuffix("=")
    try:
        return find_devices(settings.device, named_by=named_by)
    except SettingsError as exc:
        origin = "" if named_by == "device" else f" ({named_by})"
        raise SettingsError(f"device {exc}{origin}") from None


def require_open_files(settings: Settings, per_worker: int) -> None:
    """Raise SettingsError if so many workers need more descriptors than this process may have."""
    needed = max(settings.max_workers, settings.standby) * per_worker
    needed += SPARE_DESCRIPTORS if per_worker else 0
    limit = open_files(needed)
    if limit is not None:
        raise SettingsError(
            f"max_workers={settings.max_workers} needs up to {needed} file descriptors on backend "
            f"{settings.backend!r} ({per_worker} for each worker), and this process may have {limit} "
            f"(ulimit -Hn): lower max_workers, raise the limit, or take a backend that needs fewer"
        )


def warn_of_no_effect(settings: Settings, capabilities: Capability) -> None:
    """Log what was set and changes nothing on a backend with these promises."""
    for name in _NEEDS:
        if settings.sources.get(name, "default") == "default":
            continue
        if not capabilities & _NEEDS[name]:
            log.warning(NOT_KEPT, settings.backend, name)
        elif name in _OF_REUSED_WORKERS and not uses_limits(settings, capabilities):
            log.warning(_CHANGES_NOTHING, name, settings.backend)


def uses_limits(settings: Settings, capabilities: Capability) -> bool:
    """Return whether a limit of memory can end anything: a worker that is reused, or a task that runs."""
    is_reused = Capability.RECYCLES in capabilities or (
        Capability.STANDS_BY in capabilities and settings.max_tasks_per_child > 1
    )
    return settings.enforce_limits or is_reused
