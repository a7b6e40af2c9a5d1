"""The state of a federation after a round, on disk: written whole or not at all, read without executing code.

A checkpoint is an ``.npz`` file, the global model's arrays and one more that holds JSON, and behind it a line
with the SHA-256 of all that is before. The line is checked before anything else is read. The last two are
kept, so that one that a failing disk spoils does not lose the run.
"""

import hashlib
import io
import json
import logging
import os
import re
import secrets
import stat
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

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
    """A directory in which no checkpoint can be read, or that another run uses; the message says which."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a run needs to go on as if it had not been interrupted.

    Attributes
    ----------
    server_round : int
        The last that was completed; 0 is the initial model.
    weights : list of ndarray
        The global model after it.
    rounds : list of Round
        The record of each round so far.
    settings : dict
        What must be the same when the run goes on.
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
        Made if it is not there.

    Raises
    ------
    CheckpointError
        Another run uses it.
    OSError
        Nothing can be written there.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._run = secrets.token_hex(8)  # stands in each file of the run, also when it goes on
        self._written: list[Path] = []  # by this run, the oldest first
        try:
            self._lock = DirectoryLock(directory)
        except LockedError as exc:
            raise CheckpointError(f"{directory} is used by another run: {exc}") from exc

    def close(self) -> None:
        """Let another run use the directory."""
        self._lock.release()

    def latest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole, and go on with its run; None if there is none.

        Raises
        ------
        CheckpointError
            There are some, and none of them can be read.
        """
        files = _files(self.directory)
        problem: CheckpointError | None = None
        for path in files:
            try:
                run, found = _read(path)
            except CheckpointError as exc:
                problem = problem or exc
                log.warning("%s cannot be read: %s", path, exc)
                continue
            self._adopt(run, [each for each in reversed(files) if each <= path])
            return found
        if problem is not None:
            raise CheckpointError(
                f"{files[0]} is no checkpoint, nor is an older one there: {problem}"
            ) from problem
        return None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint, then remove those of this run that are too old. It is then on the disk.

        Raises
        ------
        OSError
            The disk is full, say; the checkpoints that were there are untouched.
        ValueError
            An array of objects: it could be read by executing code only.
        """
        about: dict[str, Any] = {"version": VERSION, "run": self._run}
        about |= {"server_round": checkpoint.server_round, "settings": checkpoint.settings}
        about["rounds"] = [each.as_dict() for each in checkpoint.rounds]
        arrays = {f"array_{index:05}": array for index, array in enumerate(checkpoint.weights)}
        if any(array.dtype.hasobject for array in arrays.values()):
            raise ValueError("a checkpoint cannot hold an array of Python objects")
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        path = self.directory / f"round-{checkpoint.server_round:06}.npz"
        with tempfile.NamedTemporaryFile(dir=self.directory, prefix=self._part, delete=False) as file:
            try:
                np.savez(file, **arrays)  # type: ignore[arg-type]
                file.flush()
                size = file.seek(0, os.SEEK_END)
                seal = _seal(file, size)  # type: ignore[arg-type]
                file.seek(size)
                file.write(seal)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                Path(file.name).unlink()
                raise
        Path(file.name).replace(path)
        _sync(self.directory)
        self._written = [each for each in self._written if each != path] + [path]
        for old in self._written[:-KEPT]:
            old.unlink(missing_ok=True)
        del self._written[:-KEPT]
        return path

    @property
    def _part(self) -> str:
        """Return how the names of files begin that are being written."""
        return f".{self._run}-"

    def _adopt(self, run: str, files: list[Path]) -> None:
        """Go on with a run: what is proven to be of it, whole and unfinished files, is ours to remove."""
        self._run, self._written = run, []
        for path in files:
            try:
                if _read(path)[0] == run:
                    self._written.append(path)
            except CheckpointError as exc:  # not ours to judge
                log.debug("%s stays: %s", path, exc)
        for part in self.directory.glob(f"{self._part}*"):
            part.unlink(missing_ok=True)


def _read(path: Path) -> tuple[str, Checkpoint]:
    """Read a file: which run has written it, and what. Whatever is wrong with it is a CheckpointError."""
    try:
        with io.FileIO(path, opener=_without_waiting) as raw, io.BufferedReader(raw) as file:
            status = os.fstat(raw.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ValueError("it is not a regular file")
            if status.st_size < _SEAL_BYTES:
                raise ValueError(f"it has {status.st_size} bytes only")
            seal = _seal(file, status.st_size - _SEAL_BYTES)
            ending = file.read()
            if not ending.startswith(_SEAL.partition(b"%s")[0]):
                raise ValueError(
                    "no digest is at its end: it was cut off or changed, or an older fedexec has written it"
                )
            if ending != seal:
                raise ValueError("its content is not that of its digest: it was changed or is damaged")
            file.seek(0)
            return _parse(path, file)
    except Exception as exc:  # a right digest can be made for anything, and readers raise anything
        raise CheckpointError(str(exc) or type(exc).__name__) from exc


def _parse(path: Path, content: BinaryIO) -> tuple[str, Checkpoint]:
    with np.load(content, allow_pickle=False) as file:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in file.zip.infolist()):
            raise ValueError("it is compressed, which a checkpoint never is")
        about = json.loads(file["about"].tobytes())
        if about["version"] != VERSION:
            raise ValueError(f"it has the format {about['version']}, this fedexec reads {VERSION}")
        weights = [file[name] for name in sorted(file.files) if name.startswith("array_")]
    server_round, run = about["server_round"], about["run"]
    named = _NAME.fullmatch(path.name)
    if named is None or server_round != int(named[1]):
        raise ValueError(f"it holds round {server_round}, which is not that of its name")
    if not re.fullmatch("[0-9a-f]{16}", run):
        raise ValueError(f"it says that {run!r:.40} has written it, which is the name of no run")
    rounds = [Round(**row) for row in about["rounds"]]
    if not isinstance(about["settings"], dict) or not rounds or rounds[-1].server_round != server_round:
        raise ValueError("it does not tell the run's settings, or not its last round")
    return run, Checkpoint(server_round, weights, rounds, about["settings"])


def _without_waiting(path: str, flags: int) -> int:
    """Open what may be a FIFO, which nobody writes to."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _seal(file: BinaryIO, size: int) -> bytes:
    """Return the line that belongs behind the first `size` bytes of a file, and leave it there."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (piece := file.read(min(size, 1 << 20))):
        digest.update(piece)
        size -= len(piece)
    return _SEAL % digest.hexdigest().encode()


def _files(directory: Path) -> list[Path]:
    """Return what is named like a checkpoint, the newest first."""
    return sorted(
        (path for path in directory.iterdir() if _NAME.fullmatch(path.name)),
        key=lambda path: int(path.name[6:-4]),
        reverse=True,
    )


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
