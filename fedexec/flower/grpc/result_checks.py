"""Checks that reject unusable results of clients, and the error that ends a run."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.common import EvaluateRes, FitRes, NDArrays, Scalar, ndarrays_to_parameters

from fedexec.errors import FedexecError
from fedexec.flower.grpc.client import decoded

__all__ = [
    "DueMetrics",
    "RoundFailedError",
    "UnsoundError",
    "as_model",
    "check_evaluation",
    "check_fit",
    "limits_of",
    "mean_evaluation",
]

# factor by which a value may exceed the model's largest magnitude (or 1) without being suspicious
FARTHEST = 1e6
MOST_SAMPLES = 10**9


class RoundFailedError(FedexecError, RuntimeError):
    """Too few clients of a round returned a result.

    Parameters
    ----------
    server_round : int
    reasons : tuple of str
        One for each client without a result.
    results, needed : int
        How many clients returned a result, and how many had to.
    """

    def __init__(
        self, server_round: int, reasons: tuple[str, ...], results: int = 0, needed: int = 1
    ) -> None:
        super().__init__(server_round, reasons, results, needed)
        self.server_round, self.reasons, self.results, self.needed = self.args

    def __str__(self) -> str:
        first = self.reasons[0] if self.reasons else "no client is connected"
        clients = len(self.reasons) + self.results
        if not self.results:
            return f"Round {self.server_round}: none of {clients} clients gave a result. {first}"
        return (
            f"Round {self.server_round}: {self.results} of {clients} clients gave a result, "
            f"but {self.needed} are needed. {first}"
        )


class UnsoundError(ValueError):
    """A client's result cannot be used; the message gives the reason."""


def limits_of(model: NDArrays) -> list[float]:
    """Return the magnitude above which values of a client's arrays are suspicious.

    Parameters
    ----------
    model : list of ndarray
        The global model.

    Returns
    -------
    list of float
        One limit for each array.
    """
    return [FARTHEST * max(1.0, _magnitude(array)) for array in model]


def check_fit(model: NDArrays, limits: Sequence[float], res: FitRes) -> str | None:
    """Check that a client's weights can be averaged, and convert them to the model's types.

    Parameters
    ----------
    model : list of ndarray
        The global model.
    limits : sequence of float
        Result of :func:`limits_of`.
    res : FitRes
        Its parameters are replaced if their types differ.

    Returns
    -------
    str or None
        What is suspicious about the weights, although they can be averaged.

    Raises
    ------
    UnsoundError
        The weights cannot be averaged.
    """
    try:
        arrays = decoded(res.parameters)
    except Exception as exc:  # numpy raises different exceptions for bytes that are not an array.
        raise UnsoundError(f"returned bytes that cannot be read as arrays: {exc}") from exc
    if len(arrays) != len(model):
        raise UnsoundError(f"returned {len(arrays)} arrays, but the model has {len(model)}")
    converted = [_converted(number, *both) for number, both in enumerate(zip(arrays, model, strict=True))]
    if res.num_examples <= 0:
        raise UnsoundError(f"says that it trained on {res.num_examples} samples")
    if any(new.dtype != old.dtype for new, old in zip(converted, arrays, strict=True)):
        res.parameters = ndarrays_to_parameters(converted)
    if res.num_examples > MOST_SAMPLES:
        return f"says that it trained on {res.num_examples} samples"
    for number, (array, limit) in enumerate(zip(converted, limits, strict=True)):
        if (largest := _magnitude(array)) > limit:
            return f"returned array {number} with values up to {largest:.3g}, far above {limit:.3g}"
    return None


def _converted(number: int, array: object, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array in the type used for averaging; raise UnsoundError if it does not fit the model."""
    if not isinstance(array, np.ndarray):  # numpy also reads archives of several arrays.
        raise UnsoundError(f"returned array {number} as a {type(array).__name__}")
    if array.shape != like.shape:
        raise UnsoundError(f"returned array {number} of shape {array.shape}, but the model's is {like.shape}")
    if array.dtype.kind != like.dtype.kind:
        raise UnsoundError(f"returned array {number} of type {array.dtype}, but the model's is {like.dtype}")
    if not np.isfinite(array).all():
        raise UnsoundError(f"returned array {number} with values that are not finite")
    with np.errstate(all="ignore"):
        converted = array.astype(like.dtype, copy=False)
    if converted is not array and not np.array_equal(converted, array):
        types = f"of type {array.dtype}, whose values the model's {like.dtype} cannot hold"
        raise UnsoundError(f"returned array {number} {types}")
    # Flower multiplies arrays by weights in the arrays' own type; in an integer type, weights below 1 become
    # 0.
    return converted if like.dtype.kind in "fc" else converted.astype(np.float64)


def as_model(model: NDArrays, average: NDArrays) -> NDArrays | None:
    """Convert an average to the model's types.

    Parameters
    ----------
    model : list of ndarray
    average : list of ndarray

    Returns
    -------
    list of ndarray or None
        None if the average has overflowed.
    """
    if not all(np.isfinite(array).all() for array in average):
        return None
    return [
        array.astype(like.dtype, copy=False) if like.dtype.kind in "fc" else np.rint(array).astype(like.dtype)
        for array, like in zip(average, model, strict=True)
    ]


def _magnitude(array: npt.NDArray[Any]) -> float:
    return float(np.abs(array).max(initial=0))


Metrics = Mapping[str, Scalar]


@dataclass(frozen=True, slots=True)
class DueMetrics:
    """Names and types of the metrics of a round, as the majority of its clients returns them.

    Attributes
    ----------
    numbers : frozenset of str
        Metrics that must be numbers if a client returns them.
    required : frozenset of str
        Metrics that every client must return.
    """

    numbers: frozenset[str]
    required: frozenset[str]

    @classmethod
    def of(cls, answers: Sequence[Metrics], known: Metrics) -> "DueMetrics":
        """Derive the expected metrics from all answers and from the metrics of the server itself.

        Parameters
        ----------
        answers : sequence of mapping
            Metrics of each client.
        known : mapping
            Metrics of the server's own evaluation.

        Returns
        -------
        DueMetrics
        """
        given = Counter(name for metrics in answers for name in metrics if _is_number(metrics[name]))
        numbers = {name for name, count in given.items() if 2 * count >= len(answers)}
        numbers |= {name for name, value in known.items() if _is_number(value)}
        required = {name for name, count in given.items() if 2 * count > len(answers)}
        return cls(frozenset(numbers), frozenset(required))

    def check(self, metrics: Metrics) -> None:
        """Check a client's metrics.

        Parameters
        ----------
        metrics : mapping

        Raises
        ------
        UnsoundError
            A metric is missing, not finite, or not a number.
        """
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UnsoundError(f"returned the metric {name!r:.80} as {value}")
            if name in self.numbers and not _is_number(value):
                raise UnsoundError(
                    f"returned the metric {name!r:.80} as a {type(value).__name__}, which is not a number"
                )
        for name in sorted(self.required - metrics.keys()):
            raise UnsoundError(f"returned no metric {name!r:.80}, although most other clients did")


def check_evaluation(due: DueMetrics, total: int, res: EvaluateRes) -> str | None:
    """Check that a client's evaluation can be averaged.

    Parameters
    ----------
    due : DueMetrics
    total : int
        Number of samples of all clients.
    res : EvaluateRes

    Returns
    -------
    str or None
        What is suspicious about the evaluation, although it can be averaged.

    Raises
    ------
    UnsoundError
        The evaluation cannot be averaged.
    """
    if not math.isfinite(res.loss):
        raise UnsoundError(f"returned a loss of {res.loss}")
    if res.num_examples <= 0:
        raise UnsoundError(f"says that it evaluated on {res.num_examples} samples")
    due.check(res.metrics)
    for name, value in {"loss": res.loss, **res.metrics}.items():
        if _is_number(value) and not math.isfinite(float(value) * total):
            raise UnsoundError(f"returned {name!r:.80} as {float(value):.3g}, which cannot be averaged")
    if res.num_examples > MOST_SAMPLES:
        return f"says that it evaluated on {res.num_examples} samples"
    return None


def mean_evaluation(results: Sequence[EvaluateRes]) -> tuple[float, dict[str, Scalar]]:
    """Average losses, and each metric that all clients return as a number, weighted by numbers of samples.

    Parameters
    ----------
    results : sequence of EvaluateRes

    Returns
    -------
    tuple of (float, dict)
        Loss and metrics.
    """
    total = sum(res.num_examples for res in results)

    def mean(values: Iterable[Scalar]) -> float:
        pairs = zip(values, results, strict=True)
        return sum(float(value) * res.num_examples for value, res in pairs) / total

    names = set.intersection(
        *({name for name, value in res.metrics.items() if _is_number(value)} for res in results)
    )
    metrics: dict[str, Scalar] = {name: mean(res.metrics[name] for res in results) for name in sorted(names)}
    return mean(res.loss for res in results), metrics


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
