"""Defines a device: how much memory it has, and which process holds how much of it."""

import contextlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from fedexec.errors import DeviceError

__all__ = ["LEDGER_VARIABLE", "Device", "assign", "assigned", "hidden", "is_emulated"]

LEDGER_VARIABLE = "_FEDEXEC_EMULATED_LEDGER"  # tells the processes of a program where its emulated device is


class Device(ABC):
    """One accelerator of this machine, seen from outside: asking it never starts a context on it.

    Attributes
    ----------
    uuid : str
        Identifies the device; "EMULATED-0" and so on if it is emulated.
    name : str
        Name for users; begins with "EMULATED" if the device is emulated.
    """

    uuid: str
    name: str

    @property
    def is_emulated(self) -> bool:
        """Whether the device is emulated, so that its values are not those of a real device."""
        return self.uuid.startswith("EMULATED")

    @abstractmethod
    def total_bytes(self) -> int | None:
        """Return the capacity in bytes; None if the driver no longer answers."""

    @abstractmethod
    def used_bytes(self) -> int | None:
        """Return how many bytes all processes hold together, including the driver's own share. This is cheap.

        Returns
        -------
        int or None
            None if the driver no longer answers.
        """

    @abstractmethod
    def process_bytes(self) -> Mapping[int, int] | None:
        """Return how many bytes each process holds, by pid.

        A process that is not listed is unknown; it does not hold 0 bytes. On a real device this takes
        milliseconds and may delay processes that compute on it, so it is best called between tasks.

        Returns
        -------
        mapping of int to int, or None
            None if the list as a whole cannot be trusted.
        """


def is_emulated(choice: str) -> bool:
    """Return whether a choice of devices asks for an emulated device.

    Parameters
    ----------
    choice : str
        As in the setting ``device``.

    Returns
    -------
    bool
    """
    return choice.partition(":")[0] == "emulated"


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Hide every GPU from this process while the context lasts, so that the process can be forked afterwards.

    A step of Adam on the CPU, ``pin_memory`` and ``torch.amp.GradScaler`` make torch start CUDA if it sees a
    device. After that, torch refuses CUDA in every process that is forked later.
    """
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


_assigned: str | None = None


def assign(uuid: str | None) -> None:
    """Make this process compute on one device and see no other.

    Parameters
    ----------
    uuid : str or None
        UUID of the device; None changes nothing.

    Raises
    ------
    DeviceError
        CUDA has been started in this process already, so it would ignore the change.
    """
    global _assigned
    if uuid is None or uuid == _assigned:
        return
    if not uuid.startswith("EMULATED"):
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise DeviceError(
                f"this process cannot move to device {uuid}, because it has started CUDA already"
            )
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    _assigned = uuid


def assigned() -> str | None:
    """Return the UUID that :func:`assign` was last given in this process."""
    return _assigned
