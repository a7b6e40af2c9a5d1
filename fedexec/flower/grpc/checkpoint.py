"""A federation's state after a round, on disk: written atomically, and read without executing code.

A checkpoint is an ``.npz`` file with the arrays of the global model and one more array that holds JSON. A
last line holds the SHA-256 digest of everything before it, and is checked before anything else is read. The
last two checkpoints are kept, so that the run is not lost if a failing disk damages one.
"""

import hashlib
import io
import json
import logging
import os
import re
import secrets
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fedexec._system import files
from fedexec.errors import FedexecError
from fedexec.flower.grpc.directory_lock import DirectoryLock, LockedError
from fedexec.flower.history import Round

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints"]

log = logging.getLogger("fedexec.flower")

KEPT = 2
VERSION = 2
_NAME = re.compile(r"round-(\d{6,})\.npz")
_SEAL = b"\nfedexec checkpoint, sha256 of what is before: %s\n"
_SEAL_BYTES = len(_SEAL % (b"0" * 64))


class CheckpointError(FedexecError, ValueError):
    """No checkpoint in a directory can be read, or another run uses it; the message tells which."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state that a run needs to continue as if it had not been interrupted.

    Attributes
    ----------
    server_round : int
        The last completed round; 0 is the initial model.
    weights : list of ndarray
        The global model after that round.
    rounds : list of Round
        The record of each round so far.
    settings : dict
        Settings that must be the same when the run is resumed.
    """

    server_round: int
    weights: list[npt.NDArray[Any]]
    rounds: list[Round]
    settings: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in a directory, which no other run can use until they are closed.

    Parameters
    ----------
    directory : Path
        Created if it does not exist.

    Raises
    ------
    CheckpointError
        Another run uses the directory.
    OSError
        The directory cannot be written to.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._run = secrets.token_hex(8)  # id in each file of the run, kept when the run is resumed
        self._written: list[Path] = []  # files that this run has written, the oldest first
        try:
            self._lock = DirectoryLock(directory)
        except LockedError as exc:
            raise CheckpointError(f"{directory} is used by another run: {exc}") from exc

    def close(self) -> None:
        """Let another run use the directory."""
        self._lock.release()

    def latest(self) -> Checkpoint | None:
        """Read the newest undamaged checkpoint, and continue its run.

        Returns
        -------
        Checkpoint or None
            None if the directory has no checkpoint.

        Raises
        ------
        CheckpointError
            There are checkpoints, but none can be read.
        """
        paths = _files(self.directory)
        problem: CheckpointError | None = None
        for path in paths:
            try:
                run, checkpoint = _read(path)
            except CheckpointError as exc:
                problem = problem or exc
                log.warning("%s cannot be read: %s", path, exc)
                continue
            self._adopt(run, [each for each in reversed(paths) if each <= path])
            return checkpoint
        if problem is not None:
            raise CheckpointError(
                f"{paths[0]} is not a checkpoint, and no older one can be read: {problem}"
            ) from problem
        return None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint to the disk, then remove this run's oldest checkpoints.

        Parameters
        ----------
        checkpoint : Checkpoint

        Returns
        -------
        Path
            The file.

        Raises
        ------
        OSError
            For instance, the disk is full; earlier checkpoints are unchanged.
        ValueError
            An array has Python objects, which cannot be read without executing code.
        """
        about: dict[str, Any] = {"version": VERSION, "run": self._run}
        about |= {"server_round": checkpoint.server_round, "settings": checkpoint.settings}
        about["rounds"] = [each.as_dict() for each in checkpoint.rounds]
        arrays = {f"array_{index:05}": array for index, array in enumerate(checkpoint.weights)}
        if any(array.dtype.hasobject for array in arrays.values()):
            raise ValueError("a checkpoint cannot hold an array of Python objects")
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        path = self.directory / f"round-{checkpoint.server_round:06}.npz"
        part = self.directory / f"{self._part}{secrets.token_hex(4)}"
        with files.new_version(path, part) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            size = file.seek(0, os.SEEK_END)
            seal = _seal(file, size)
            file.seek(size)
            file.write(seal)
        self._written = [each for each in self._written if each != path] + [path]
        for old in self._written[:-KEPT]:
            old.unlink(missing_ok=True)
        del self._written[:-KEPT]
        return path

    @property
    def _part(self) -> str:
        """Return the prefix of the names of unfinished files."""
        return f".{self._run}-"

    def _adopt(self, run: str, files: list[Path]) -> None:
        """Continue a run: complete and unfinished files that are proven to belong to it may be removed."""
        self._run, self._written = run, []
        for path in files:
            try:
                if _read(path)[0] == run:
                    self._written.append(path)
            except CheckpointError as exc:  # It cannot be shown that this file belongs to the run.
                log.debug("%s stays: %s", path, exc)
        for part in self.directory.glob(f"{self._part}*"):
            part.unlink(missing_ok=True)


def _read(path: Path) -> tuple[str, Checkpoint]:
    """Read a file's run id and checkpoint; raise CheckpointError for anything that is wrong with the file."""
    try:
        with io.FileIO(path, opener=_without_waiting) as raw, io.BufferedReader(raw) as file:
            status = os.fstat(raw.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            if status.st_size < _SEAL_BYTES:
                raise ValueError(f"it has only {status.st_size} bytes")
            seal = _seal(file, status.st_size - _SEAL_BYTES)
            ending = file.read()
            if not ending.startswith(_SEAL.partition(b"%s")[0]):
                raise ValueError(
                    "there is no digest at its end: it was cut off or changed, or an older fedexec wrote it"
                )
            if ending != seal:
                raise ValueError("its content does not match its digest: it was changed or damaged")
            file.seek(0)
            return _parse(path, file)
    except Exception as exc:  # A valid digest can be made for any content, and readers raise any exception.
        raise CheckpointError(str(exc) or type(exc).__name__) from exc


def _parse(path: Path, content: BinaryIO) -> tuple[str, Checkpoint]:
    with np.load(content, allow_pickle=False) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.zip.infolist()):
            raise ValueError("it is compressed, which a checkpoint never is")
        about = json.loads(file["about"].tobytes())
        if about["version"] != VERSION:
            raise ValueError(f"its format is {about['version']}, but this fedexec reads {VERSION}")
        weights = [file[name] for name in sorted(file.files) if name.startswith("array_")]
    server_round, run = about["server_round"], about["run"]
    name_match = _NAME.fullmatch(path.name)
    if name_match is None or server_round != int(name_match[1]):
        raise ValueError(f"it holds round {server_round}, but its name says another")
    if not re.fullmatch("[0-9a-f]{16}", run):
        raise ValueError(f"it names {run!r:.40} as its run, which is not a valid run id")
    rounds = [Round(**row) for row in about["rounds"]]
    if not isinstance(about["settings"], dict) or not rounds or rounds[-1].server_round != server_round:
        raise ValueError("the run's settings or its last round are missing")
    return run, Checkpoint(server_round, weights, rounds, about["settings"])


def _without_waiting(path: str, flags: int) -> int:
    """Open a path without blocking, because it may be a FIFO without a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _seal(file: BinaryIO, size: int) -> bytes:
    """Return the line that belongs after the first `size` bytes of a file, which is positioned there."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (piece := file.read(min(size, 1 << 20))):
        digest.update(piece)
        size -= len(piece)
    return _SEAL % digest.hexdigest().encode()


def _files(directory: Path) -> list[Path]:
    """Return the files that are named like checkpoints, the newest first."""
    return sorted(
        (path for path in directory.iterdir() if _NAME.fullmatch(path.name)),
        key=lambda path: int(path.name[6:-4]),
        reverse=True,
    )
