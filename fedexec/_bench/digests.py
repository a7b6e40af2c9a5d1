"""Fingerprints of what clients return: the same bits, the same fingerprint, in any process."""

import hashlib
from typing import Any

import cloudpickle
import numpy as np

__all__ = ["digest"]


def digest(value: Any) -> str:
    """Return a SHA-256 of arrays, tensors, and what else is nested in lists, tuples and dicts."""
    hashed = hashlib.sha256()
    _add(hashed, value)
    return hashed.hexdigest()


def _add(hashed: Any, value: Any) -> None:
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        hashed.update(f"array{value.dtype.str}{value.shape}".encode())
        hashed.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, list | tuple):
        hashed.update(f"{type(value).__name__}{len(value)}".encode())
        for item in value:
            _add(hashed, item)
    elif isinstance(value, dict):
        hashed.update(f"dict{len(value)}".encode())
        for key, item in value.items():
            _add(hashed, key)
            _add(hashed, item)
    elif isinstance(value, str | bytes | int | float | bool | None):
        hashed.update(f"{type(value).__name__}{value!r}".encode())
    else:
        hashed.update(cloudpickle.dumps(value))
