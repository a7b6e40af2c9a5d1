"""What a caller says that a task needs: read, and compared with what this machine has."""

from collections.abc import Sequence
from dataclasses import replace

from fedexec._system.available_resources import available_cores, total_bytes
from fedexec._system.sizes import format_size, parse_size
from fedexec.devices.device import Device
from fedexec.errors import SettingsError
from fedexec.interface import Needs

__all__ = ["read_needs"]


def read_needs(
    before: Needs,
    devices: Sequence[Device] | None,
    memory: int | str | None,
    device_memory: int | str | None,
    threads: int | None,
) -> Needs:
    """Read what a task needs.

    Parameters
    ----------
    before : Needs
        What holds for values that are None.
    devices : sequence of Device or None
        The devices of this machine; None if tasks run on others, which are not known here.
    memory, device_memory : int or str or None
        In bytes, or a text such as ``"2GiB"``.
    threads : int or None

    Returns
    -------
    Needs

    Raises
    ------
    SettingsError
        A value is invalid, or more than this machine has.
    """
    needs = before
    if memory is not None:
        needs = replace(needs, memory=_size("memory", memory))
    if device_memory is not None:
        needs = replace(needs, device_memory=_size("device_memory", device_memory))
    if threads is not None:
        if type(threads) is not int or threads < 1:
            raise SettingsError(f"threads must be an integer of at least 1, got {threads!r}")
        needs = replace(needs, threads=threads)
    if devices is not None:
        _check(needs, devices)
    return needs


def _size(name: str, value: int | str) -> int:
    try:
        return parse_size(value)
    except ValueError as exc:
        raise SettingsError(f"{name}: {exc}") from exc


def _check(needs: Needs, devices: Sequence[Device]) -> None:
    if needs.memory is not None:
        _compare("of memory", needs.memory, total_bytes())
    if needs.threads is not None and needs.threads > available_cores():
        raise SettingsError(f"a task needs {needs.threads} threads, and there are {available_cores()} cores")
    if needs.device_memory:
        if not devices:
            raise SettingsError("a task needs a device, and there is none")
        totals = [device.total_bytes() for device in devices]
        known = [total for total in totals if total is not None]
        if len(known) == len(totals):
            _compare("of one device", needs.device_memory, max(known))


def _compare(what: str, needed: int, there: int) -> None:
    if needed > there:
        raise SettingsError(f"a task needs {format_size(needed)} {what}, and there are {format_size(there)}")
