"""Images, labels, and their partition over clients; needs only numpy, and torchvision for CIFAR-10.

A :class:`DataSpec` of a few bytes describes the data completely. It is sent to the worker, which loads the
data itself.
"""

import functools
import os
import threading
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedexec.errors import FedexecError

__all__ = ["DATASETS", "PARTITIONS", "DataError", "DataSpec", "Samples", "load_data", "partition"]

DATASETS = ("digits", "cifar10")
PARTITIONS = ("iid", "dirichlet")

# numpy parses the header of a file with `ast`, which fails at random on CPython 3.11 if several threads use
# it at once ("AST constructor recursion depth mismatch"), as clients on `inline` do.
_parsing = threading.Lock()


def _renew_lock() -> None:
    global _parsing
    _parsing = threading.Lock()  # A thread of the parent may have held it when this process was forked.


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)

_DIGITS = Path(__file__).with_name("digits.npz")
_DIGITS_TRAIN = 1437  # of 1,797 images: four fifths


class DataError(FedexecError, ValueError):
    """A data set is missing, damaged or too small; the message says what to do."""


class Samples(NamedTuple):
    """Images and their classes.

    Attributes
    ----------
    images : ndarray of float32, shape (n, 3, 32, 32)
        Pixels, scaled to -1..1.
    labels : ndarray of int64, shape (n,)
        Classes, 0 to 9.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSpec:
    """A data set and its partition.

    Attributes
    ----------
    name : {"digits", "cifar10"}
    directory : str
        Directory of CIFAR-10.
    download : bool
        Whether CIFAR-10 may be downloaded.
    partition : {"iid", "dirichlet"}
    alpha : float
        Concentration of the Dirichlet distribution; the smaller it is, the more the clients differ.
    clients : int
        Number of parts of the training set.
    seed : int
        Determines the partition and the initial weights.
    """

    name: str = "digits"
    directory: str = "dataset"
    download: bool = False
    partition: str = "iid"
    alpha: float = 0.5
    clients: int = 1
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Return the spec as JSON-compatible values."""
        return asdict(self)


def load_data(spec: DataSpec, *, client: int | None = None) -> Samples:
    """Load one client's training samples, or the common test set.

    Parameters
    ----------
    spec : DataSpec
    client : int, optional
        From 0 to ``spec.clients - 1``; None: the test set, on which no client trains.

    Returns
    -------
    Samples

    Raises
    ------
    DataError
        The data is missing or damaged, or there are more clients than samples.
    """
    raw_images, labels = _load_raw(spec.name, spec.directory, spec.download, train=client is not None)
    if client is not None:
        indices = partition(labels, spec)[client]
        raw_images, labels = raw_images[indices], labels[indices]
    prepare = _prepare_digits if spec.name == "digits" else _prepare_cifar10
    return Samples(prepare(raw_images), labels.astype(np.int64))


def partition(labels: npt.NDArray[Any], spec: DataSpec) -> list[npt.NDArray[np.int64]]:
    """Distribute the samples over the clients; the same spec gives the same partition on every machine.

    Parameters
    ----------
    labels : ndarray of int, shape (n,)
    spec : DataSpec

    Returns
    -------
    list of ndarray of int64
        For each client, the indices of its samples. Every sample belongs to exactly one client, and every
        client has at least one sample.

    Raises
    ------
    DataError
        There are more clients than samples.

    Notes
    -----
    "dirichlet" draws the shares of each class from Dir(alpha): Hsu et al. 2019 (arXiv:1909.06335).
    """
    if spec.clients > len(labels):
        raise DataError(f"{spec.clients} clients cannot share {len(labels)} training samples")
    rng = np.random.default_rng(spec.seed)
    if spec.partition == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(len(labels)), spec.clients)]
    parts: list[list[int]] = [[] for _ in range(spec.clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(spec.clients, spec.alpha))
        cuts = (np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, share in zip(parts, np.split(members, cuts), strict=True):
            part.extend(share.tolist())
    for part in parts:
        if not part:  # A client without a sample cannot train, so the largest part gives it one.
            part.append(max(parts, key=len).pop())
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


@functools.lru_cache(maxsize=4)
def _load_raw(
    name: str, directory: str, download: bool, *, train: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """Load a whole data set once per process, in the small types in which it is stored."""
    if name == "digits":
        return _read_digits(_DIGITS, train=train)
    if name == "cifar10":
        return _read_cifar10(directory, download=download, train=train)
    raise DataError(f"there is no data set {name!r}; known: {', '.join(DATASETS)}")


def _read_digits(path: Path, *, train: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    try:
        with _parsing, np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as exc:
        raise DataError(f"{path} is damaged ({exc}); install fedexec again") from exc
    # The file is ordered by writer, so it is shuffled before it is split, always with the same seed.
    order = np.random.default_rng(0).permutation(len(labels))
    selected = order[:_DIGITS_TRAIN] if train else order[_DIGITS_TRAIN:]
    return images[selected], labels[selected]


def _read_cifar10(
    directory: str, *, download: bool, train: bool
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    try:
        from torchvision.datasets import CIFAR10  # This import takes 2.3 s, so it is made only for CIFAR-10.
    except ImportError as exc:
        raise DataError("CIFAR-10 needs torchvision: pip install 'fedexec[demo]'") from exc
    try:
        dataset = CIFAR10(directory, train=train, download=download)
    except Exception as exc:
        # torchvision raises RuntimeError, OSError, EOFError, UnpicklingError, KeyError and others.
        first = str(exc).partition(". ")[0] or type(exc).__name__
        hint = "" if download else ". Put cifar-10-batches-py there, or allow its download (--download)"
        raise DataError(f"CIFAR-10 in {directory!r}: {first}{hint}") from exc
    return dataset.data, np.array(dataset.targets)


def _prepare_digits(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Scale images bilinearly from 8x8 to 32x32 and from 0..16 to -1..1, in three equal channels."""
    enlarge = _bilinear_weights(8, 32)
    large = enlarge @ (images.astype(np.float32) / 8 - 1) @ enlarge.T
    return np.repeat(large[:, np.newaxis], 3, axis=1)


def _bilinear_weights(source: int, target: int) -> npt.NDArray[np.float32]:
    """Return a (target, source) matrix that interpolates along one axis, with aligned pixel centres."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    left = np.minimum(position.astype(int), source - 2)
    weights = np.zeros((target, source), dtype=np.float32)
    rows = np.arange(target)
    weights[rows, left] = 1 - (position - left)
    weights[rows, left + 1] = position - left
    return weights


def _prepare_cifar10(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Put the channels first, and scale pixels from 0..255 to -1..1."""
    scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(scaled)
