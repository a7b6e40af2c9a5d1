"""Charges an EMULATED device with the bytes that tensors really need, where there is no real one.

Tensors stay on the CPU and are computed there. Each storage that torch makes is entered into the books of
:mod:`fedexec.memory.emulated` for as long as it lives: weights, gradients, what the optimizer keeps, what
autograd keeps for the backward pass. What a GPU needs besides (workspaces of its libraries) is not counted.
"""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fedexec.memory.device import is_emulated
from fedexec.memory.emulated import Block, EmulatedDevice, device

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
    if is_emulated(os.environ.get("FEDEXEC_DEVICE", "")):
        with _Charging(device()) as charging:
            yield torch.device("cpu"), charging.put
        return
    where = torch.device("cpu")
    if torch.cuda.is_available():
        torch.backends.cudnn.deterministic = True
        where = torch.device("cuda:0")
    yield where, lambda array: torch.from_numpy(array).to(where)


class _Charging(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, on: EmulatedDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = on
        self._known: dict[weakref.ref[Any], Block] = {}  # storage -> its block, until it is gone

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self._enter, made)
        return made

    def put(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Enter an array that a GPU would get a copy of."""
        tensor = torch.from_numpy(array)
        self._enter(tensor)
        return tensor

    def _enter(self, tensor: torch.Tensor) -> None:
        # torch keeps one Python object for a storage as long as the storage lives, in C++ too.
        storage = weakref.ref(tensor.untyped_storage(), self._leave)
        if storage not in self._known and tensor.untyped_storage().nbytes():
            self._known[storage] = self._device.allocate(tensor.untyped_storage().nbytes())

    def _leave(self, storage: "weakref.ref[Any]") -> None:
        block = self._known.pop(storage, None)
        if block is not None:
            block.free()
