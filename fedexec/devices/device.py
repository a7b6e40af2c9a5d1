"""What a device is to fedexec: how much memory it has, and who holds how much of it."""

import contextlib
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

from fedexec.errors import DeviceError

__all__ = ["LEDGER_VARIABLE", "Device", "assign", "assigned", "hidden", "is_emulated"]

LEDGER_VARIABLE = "_FEDEXEC_EMULATED_LEDGER"  # where the processes of one program find its emulated device


class Device(ABC):
    """One accelerator of this machine, seen from outside: asking it starts no context on it.

    Attributes
    ----------
    uuid : str
        What tells it from every other device; "EMULATED-0" if it is emulated.
    name : str
        For people; begins with "EMULATED" if it is.
    """

    uuid: str
    name: str

    @property
    def is_emulated(self) -> bool:
        """Whether its figures come from no real device."""
        return self.uuid.startswith("EMULATED")

    @abstractmethod
    def total_bytes(self) -> int | None:
        """Return its capacity; None if the driver does not answer any more."""

    @abstractmethod
    def used_bytes(self) -> int | None:
        """Return what all processes hold together, the driver's own share included. Cheap."""

    @abstractmethod
    def process_bytes(self) -> Mapping[int, int] | None:
        """Return pid to what that process holds.

        None where the list cannot be trusted as a whole; a pid that is not in it is unknown, which is not 0.
        Takes milliseconds on a real device, and may hold up those that compute on it: ask between tasks.
        """


def is_emulated(choice: str) -> bool:
    """Return whether this is how an emulated device is chosen."""
    return choice.partition(":")[0] == "emulated"


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Hide every GPU from what this process does meanwhile, so that it can be forked afterwards.

    A step of Adam on the CPU, ``pin_memory`` or ``torch.amp.GradScaler`` has torch start CUDA where it sees a
    device, and torch then refuses CUDA in every process that is forked later.
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
    """Have this process compute on one device and see no other.

    Parameters
    ----------
    uuid : str or None
        None changes nothing.

    Raises
    ------
    DeviceError
        CUDA has been started here already: it would not hear of it.
    """
    global _assigned
    if uuid is None or uuid == _assigned:
        return
    if not uuid.startswith("EMULATED"):
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise DeviceError(f"this process cannot move to device {uuid}: it has started CUDA already")
        os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        os.environ["CUDA_VISIBLE_DEVICES"] = uuid
    _assigned = uuid


def assigned() -> str | None:
    """Return the UUID that :func:`assign` was last given in this process."""
    return _assigned
