"""Charges an EMULATED device with the bytes that tensors really need, where there is no real one.

Tensors stay on the CPU and are computed there. Each storage that torch makes is entered into the books of the
device (:mod:`~fedexec.devices.emulated.emulated_device`) for as long as it lives: weights, gradients, what
the optimizer keeps, what autograd keeps for the backward pass. What a GPU needs besides (workspaces of its
libraries) is not counted, nor what other threads and forked processes make: torch asks only the thread that
computes.
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
    """Lend what to compute on: the GPU if there is one, held to reproducible algorithms, else the CPU.

    Yields
    ------
    tuple of (torch.device, callable)
        The second moves an array there.

    Raises
    ------
    torch.OutOfMemoryError
        Inside the block, where a device is emulated: its tensors do not fit.
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


# Storage to its size and its block, until it is gone. Of the process, as the device is: what outlives one
# `computing()` is known in the next, and is charged once.
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
        if os.getpid() == self._pid:  # a DataLoader's worker inherits this mode, and uses no GPU
            if isinstance(made, torch.Tensor):  # nearly always, and then a tree is half of the cost
                self._enter(made)
            else:
                tree_map_only(torch.Tensor, self._enter, made)
        return made

    def put(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Enter an array that a GPU would get a copy of."""
        tensor = torch.from_numpy(array)
        self._enter(tensor)
        return tensor

    def _enter(self, tensor: torch.Tensor) -> None:
        for storage in _storages(tensor):
            # torch keeps one Python object for a storage as long as the storage lives, in C++ too.
            reference = weakref.ref(storage, _leave)
            nbytes, block = _known.get(reference, (0, None))
            if storage.nbytes() == nbytes:
                continue
            # New, or resized: then the new piece is taken before the old one is given back, as on a GPU.
            if storage.nbytes():
                _known[reference] = (storage.nbytes(), self._device.allocate(storage.nbytes()))
            else:
                del _known[reference]
            if block is not None:
                block.free()


def _storages(tensor: torch.Tensor) -> "Iterable[torch.UntypedStorage]":
    """Return what holds a tensor's bytes: nothing for one that only has a shape."""
    parts: Iterable[torch.Tensor] = (tensor,)
    if tensor.layout in _PARTS:
        parts = (getattr(tensor, name)() for name in _PARTS[tensor.layout])
    try:
        storages = [part.untyped_storage() for part in parts]
    except NotImplementedError:  # a layout of the CPU's own libraries (oneDNN), which no GPU has
        return ()
    return [storage for storage in storages if storage.device.type != "meta"]


_PARTS = {  # of sparse tensors
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
