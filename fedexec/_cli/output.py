"""What a command leaves: JSON, weights, a page."""

import contextlib
import hashlib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedexec._cli.options import STDOUT
from fedexec._system import files
from fedexec.errors import FedexecError

__all__ = ["as_dicts", "as_json", "as_npz", "as_plain", "digest", "stdout_as_stderr", "write"]


def digest(weights: Iterable[npt.NDArray[Any]]) -> str:
    """Hash the bits of the weights: two runs are equal if this is."""
    digest = hashlib.sha256()
    for array in weights:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write(*outputs: tuple[Path | None, Callable[[], str | bytes | memoryview]]) -> None:
    """Write each output that was asked for, and its content, also where one before it cannot be written.

    Raises
    ------
    FedexecError
        What could not be written, and why.
    """
    failed = []
    for path, content in outputs:
        if path is None:
            continue
        made = content()
        if path == STDOUT and isinstance(made, str):
            sys.stdout.write(made)
            continue
        try:
            files.write(path, made.encode() if isinstance(made, str) else made)
        except files.UnwritableError as exc:
            failed.append(str(exc))
    if failed:
        raise FedexecError("; ".join(failed))


def as_json(content: dict[str, Any]) -> str:
    """Return JSON as people read it."""
    return json.dumps(content, indent=2, default=as_plain) + "\n"


def as_plain(value: object) -> object:
    """Return what an app has measured as JSON has it: a number of numpy's as a number, all else as text."""
    return value.item() if isinstance(value, np.generic) else repr(value)


def as_npz(*arrays: npt.NDArray[Any], **named: npt.NDArray[Any]) -> memoryview:
    """Return weights as numpy's file of arrays."""
    file = io.BytesIO()
    np.savez(file, *arrays, **named)  # type: ignore[arg-type]
    return file.getbuffer()


class _Record(Protocol):
    def as_dict(self) -> dict[str, Any]: ...


def as_dicts(records: Iterable[_Record]) -> list[dict[str, Any]]:
    """Return records as JSON knows them."""
    return [record.as_dict() for record in records]


@contextlib.contextmanager
def stdout_as_stderr() -> Iterator[None]:
    """Keep standard output for JSON: what a task or an app prints, here and in workers, goes to the other."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(ours, 1)
        os.close(ours)
