"""Flower's records between processes: pickled bytes for everything but arrays, whose bytes travel separately.

A Flower ``Array`` that has computed its object id can no longer be pickled or copied, because it keeps views
of its bytes. So this module takes an array apart and rebuilds it after the transfer. The bytes travel like
those of any array, through shared memory if they are large; an object that is packed once and sent to many
nodes lies there once.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import numpy.typing as npt
from flwr.app import Array

from fedexec._channel.pickling import Pickler
from fedexec._channel.unpickling import loads

__all__ = ["Packed", "pack", "unpack"]


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """An object that is ready to be sent.

    Attributes
    ----------
    skeleton : bytes
        The pickled object without the bytes of its arrays.
    buffers : tuple of ndarray of uint8
        The bytes of each array.
    """

    skeleton: bytes
    buffers: tuple[npt.NDArray[np.uint8], ...] = ()

    def to_bytes(self) -> bytes:
        """Return the object as one byte string, which keeps no shared memory in use."""
        return pickle.dumps((self.skeleton, tuple(buffer.tobytes() for buffer in self.buffers)))

    @classmethod
    def from_bytes(cls, data: bytes) -> "Packed":
        """Make a packed object from what :meth:`to_bytes` returned.

        Parameters
        ----------
        data : bytes

        Returns
        -------
        Packed
        """
        skeleton, buffers = pickle.loads(data)
        return cls(skeleton, tuple(np.frombuffer(buffer, np.uint8) for buffer in buffers))


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles by value what ``__main__`` and closures define, and pickles arrays by their bytes."""

    dispatch_table = Pickler.dispatch_table

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Array:
            return _array, (obj.dtype, tuple(obj.shape), obj.stype, pickle.PickleBuffer(obj.data))
        return super().reducer_override(obj)


def _array(dtype: str, shape: tuple[int, ...], stype: str, data: Any) -> Array:
    return Array(dtype, shape, stype, bytes(data))


def pack(obj: Any) -> Packed:
    """Take an object apart: a Message, a RecordDict, a tuple of arguments, or any other picklable object.

    Parameters
    ----------
    obj : object

    Returns
    -------
    Packed
        Its buffers are views of the object's arrays, so the arrays must not change until the object has
        arrived.
    """
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()
    _Pickler(file, protocol=5, buffer_callback=buffers.append).dump(obj)
    return Packed(file.getvalue(), tuple(np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers))


def unpack(packed: Packed, *, keep_classes: bool = False) -> Any:
    """Rebuild an object; plain ndarrays in it are views of the buffers.

    Parameters
    ----------
    packed : Packed
    keep_classes : bool
        True for results of a worker, which must not change the classes of this process; see
        :func:`fedexec._channel.unpickling.loads`.

    Returns
    -------
    object
    """
    read = loads if keep_classes else pickle.loads
    return read(packed.skeleton, buffers=packed.buffers)
