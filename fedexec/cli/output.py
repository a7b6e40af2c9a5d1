"""What a run leaves: JSON, weights in a file, whole or not at all."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedexec.cli.options import STDOUT

__all__ = ["as_dicts", "digest", "stdout_as_stderr", "write", "write_json"]


def digest(weights: Iterable[npt.NDArray[Any]]) -> str:
    """Hash the bits of the weights: two runs are equal if this is."""
    digest = hashlib.sha256()
    for array in weights:
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON to a file, or to standard output."""
    text = json.dumps(content, indent=2) + "\n"
    if path == STDOUT:
        sys.stdout.write(text)
    else:
        write(path, lambda file: file.write(text.encode()))


def write(path: Path, content: Callable[[Any], object]) -> None:
    """Write a whole file or none: to a temporary one beside it, then renamed."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            content(file)
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).replace(path)


def as_dicts(records: list[Any]) -> list[dict[str, Any]]:
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
