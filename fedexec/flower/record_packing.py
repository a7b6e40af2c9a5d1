"""Flower's records between processes: what is not an array as pickled bytes, the arrays beside it.

A Flower ``Array`` that has computed its object id cannot be pickled any more, nor copied: it keeps views of
its bytes. So it is taken apart here and put together again there. Its bytes travel like any array's, through
shared memory where they are large; what is packed once and sent to many lies there once.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import numpy.typing as npt
from flwr.app import Array

from fedexec._channel.pickling import Pickler, loads

__all__ = ["Packed", "pack", "unpack"]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """An object on its way.

    Attributes
    ----------
    skeleton : bytes
        The object, without
    buffers : tuple of ndarray of uint8
        the bytes of its arrays.
    """

    skeleton: bytes
    buffers: tuple[npt.NDArray[np.uint8], ...] = ()

    def to_bytes(self) -> bytes:
        """Return this in one piece, which keeps no shared memory."""
        return pickle.dumps((self.skeleton, tuple(buffer.tobytes() for buffer in self.buffers)))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Packed":
        """Read what :meth:`to_bytes` wrote."""
        skeleton, buffers = pickle.loads(data)
        return cls(skeleton, tuple(np.frombuffer(buffer, np.uint8) for buffer in buffers))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles by value what ``__main__`` and closures define, and arrays by their bytes."""

    dispatch_table = Pickler.dispatch_table

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Array:
            return _array, (obj.dtype, tuple(obj.shape), obj.stype, pickle.PickleBuffer(obj.data))
        return super().reducer_override(obj)


def _array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    return Array(dtype, shape, stype, bytes(data))


def pack(obj: Any) -> Packed:
    """Take an object apart: a Message, a RecordDict, a tuple of arguments, anything that pickles.

    The buffers are views of its arrays: nobody may write to those until it has arrived.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(obj)
    return Packed(file.getvalue(), tuple(np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers))


def unpack(packed: Packed, *, keep_classes: bool = False) -> Any:
    """Put an object together again; plain ndarrays in it are views of the buffers.

    Parameters
    ----------
    packed : Packed
    keep_classes : bool
        What comes back from a worker must not change this process's classes; see :func:`pickling.loads`.
    """
    read = loads if keep_classes else pickle.loads
    return read(packed.skeleton, buffers=packed.buffers)
