"""The state of a federation after a round, on disk: written whole or not at all, read without executing code.

A checkpoint is an ``.npz`` file: the global model's arrays, and one more that holds JSON. The last two are
kept, so that one that a failing disk spoils does not lose the run.
"""

import json
import logging
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedexec.errors import FedexecError

__all__ = ["Checkpoint", "CheckpointError", "latest", "save"]

log = logging.getLogger("fedexec.flower")

KEPT = 2
VERSION = 1


class CheckpointError(FedexecError, ValueError):
    """A directory in which no checkpoint can be read; the message says why."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on as if it had not been interrupted.

    Attributes
    ----------
    server_round : int
        The last that was completed; 0 is the initial model.
    weights : list of ndarray
        The global model after it.
    rounds : list of dict
        The record of each round so far, as :meth:`fedexec.flower.Round.as_dict` gives it.
    settings : dict
        What must be the same when the run goes on.
    """

    server_round: int
    weights: list[npt.NDArray[Any]]
    rounds: list[dict[str, Any]]
    settings: dict[str, Any]


def save(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, then remove those that are too old. It is on the disk when this returns.

    Raises
    ------
    OSError
        The disk is full, say; the checkpoints that were there are untouched.
    ValueError
        An array of objects: it could be read by executing code only.
    """
    about: dict[str, Any] = {"version": VERSION, "server_round": checkpoint.server_round}
    about |= {"rounds": checkpoint.rounds, "settings": checkpoint.settings}
    arrays = {f"array_{index:05}": array for index, array in enumerate(checkpoint.weights)}
    if any(array.dtype.hasobject for array in arrays.values()):
        raise ValueError("a checkpoint cannot hold an array of Python objects")
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    path = directory / f"round-{checkpoint.server_round:06}.npz"
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".round-", delete=False) as file:
        try:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            Path(file.name).unlink()
            raise
    Path(file.name).replace(path)
    _sync(directory)
    for old in _files(directory)[KEPT:]:
        old.unlink(missing_ok=True)
    return path


def latest(directory: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is whole; None if there is none.

    Raises
    ------
    CheckpointError
        There are some, and none of them can be read.
    """
    files = _files(directory)
    problem: Exception | None = None
    for path in files:
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, EOFError) as exc:
            problem = exc
            log.warning("%s cannot be read: %s", path, exc)
    if problem is not None:
        raise CheckpointError(
            f"{files[0]} is no checkpoint, nor is an older one there: {problem}"
        ) from problem
    return None


def _read(path: Path) -> Checkpoint:
    with np.load(path, allow_pickle=False) as file:
        about = json.loads(file["about"].tobytes())
        if about["version"] != VERSION:
            raise ValueError(f"it has the format {about['version']}, this fedexec reads {VERSION}")
        weights = [file[name] for name in sorted(file.files) if name.startswith("array_")]
    return Checkpoint(int(about["server_round"]), weights, about["rounds"], about["settings"])


def _files(directory: Path) -> list[Path]:
    """Return all checkpoints, the newest first."""
    return sorted(directory.glob("round-*.npz"), reverse=True)


def _sync(directory: Path) -> None:
    """Have the directory's own entry on the disk, where that can be asked for."""
    try:
        fd = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
