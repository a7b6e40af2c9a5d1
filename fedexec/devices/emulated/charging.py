"""Charges an EMULATED device with the bytes that tensors really need, on machines without a real device.

Tensors stay on the CPU and are computed there. Each storage that torch makes is charged to the device
(:mod:`~fedexec.devices.emulated.emulated_device`) as long as the storage lives: weights, gradients, the state
of the optimizer, and what autograd keeps for the backward pass. Not charged are the workspaces of a GPU's
libraries, and tensors of other threads and of forked processes, because torch calls this module only in the
thread that computes.
"""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fedexec.devices.device import is_emulated
from fedexec.devices.emulated.caching import Block
from fedexec.devices.emulated.emulated_device import EmulatedDevice, device

__all__ = ["computing"]


Put = Callable[[npt.NDArray[Any]], torch.Tensor]


@contextlib.contextmanager
def computing() -> Iterator[tuple[torch.device, Put]]:
    """Lend a device to compute on: the GPU if there is one, with reproducible algorithms, else the CPU.

    Yields
    ------
    device : torch.device
    put : callable
        ``put(array)`` returns a tensor with the array's values on the device.

    Raises
    ------
    torch.OutOfMemoryError
        Tensors do not fit into an emulated device; this is raised inside the context.
    """
    chosen = os.environ.get("FEDEXEC_DEVICE", "")
    if is_emulated(chosen):
        with _Charging(device()) as charging:
            yield torch.device("cpu"), charging.put
        return
    where = torch.device("cpu")
    if chosen != "none" and torch.cuda.is_available():
        torch.backends.cudnn.deterministic = True
        where = torch.device("cuda:0")
    yield where, lambda array: torch.from_numpy(array).to(where)


# Storage to its size in bytes and its block. It belongs to the process, as the device does, so that a storage
# that outlives one `computing()` is charged only once.
_known: "dict[weakref.ref[Any], tuple[int, Block]]" = {}


class _Charging(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, on: EmulatedDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = on
        self._pid = os.getpid()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if os.getpid() == self._pid:  # a worker of a DataLoader inherits this mode, but would not use a GPU
            if isinstance(made, torch.Tensor):  # nearly always true, and saves half of the cost of a tree
                self._enter(made)
            else:
                tree_map_only(torch.Tensor, self._enter, made)
        return made

    def put(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Return a tensor of an array, and charge it, because a GPU would get a copy of the array."""
        tensor = torch.from_numpy(array)
        self._enter(tensor)
        return tensor

    def _enter(self, tensor: torch.Tensor) -> None:
        for storage in _storages(tensor):
            # torch keeps one Python object for a storage as long as the storage lives, also in C++.
            reference = weakref.ref(storage, _leave)
            nbytes, block = _known.get(reference, (0, None))
            if storage.nbytes() == nbytes:
                continue
            # A new or resized storage: allocate the new block before the old block is freed, as on a GPU.
            if storage.nbytes():
                _known[reference] = (storage.nbytes(), self._device.allocate(storage.nbytes()))
            else:
                del _known[reference]
            if block is not None:
                block.free()


def _storages(tensor: torch.Tensor) -> "Iterable[torch.UntypedStorage]":
    """Return the storages that hold the bytes of a tensor; there are none if it has only a shape."""
    parts: Iterable[torch.Tensor] = (tensor,)
    if tensor.layout in _PARTS:
        parts = (getattr(tensor, name)() for name in _PARTS[tensor.layout])
    try:
        storages = [part.untyped_storage() for part in parts]
    except NotImplementedError:  # a layout of a CPU library (oneDNN) that no GPU has
        return ()
    return [storage for storage in storages if storage.device.type != "meta"]


_PARTS = {  # methods that return the parts of sparse tensors
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}


def _leave(storage: "weakref.ref[Any]") -> None:
    _, block = _known.pop(storage, (0, None))
    if block is not None:
        block.free()
