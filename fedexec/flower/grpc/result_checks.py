"""What ends a run, and which results are none."""

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

FARTHEST = 1e6  # times the model's magnitude, or 1
MOST_SAMPLES = 10**9


class RoundFailedError(FedexecError, RuntimeError):
    """Too few clients of a round gave a result.

    Parameters
    ----------
    server_round : int
    reasons : tuple of str
        One a client that gave none.
    results, needed : int
        How many gave one, and how many had to.
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
            return f"Round {self.server_round}: no client gave a result, of {clients}. {first}"
        return (
            f"Round {self.server_round}: {self.results} of {clients} clients gave a result, "
            f"{self.needed} are needed. {first}"
        )


class UnsoundError(ValueError):
    """A client's result is none; the message says why."""


def limits_of(model: NDArrays) -> list[float]:
    """Return up to which magnitude a client's arrays are no surprise, next to the model's."""
    return [FARTHEST * max(1.0, _magnitude(array)) for array in model]


def check_fit(model: NDArrays, limits: Sequence[float], res: FitRes) -> str | None:
    """Check that a client's weights can be averaged into the model, and give them the model's types.

    Returns
    -------
    str or None
        What is odd about them, though they can be averaged.

    Raises
    ------
    UnsoundError
        They cannot.
    """
    try:
        arrays = decoded(res.parameters)
    except Exception as exc:  # whatever numpy says to bytes that are no array
        raise UnsoundError(f"returned what cannot be read as arrays: {exc}") from exc
    if len(arrays) != len(model):
        raise UnsoundError(f"returned {len(arrays)} arrays, the model has {len(model)}")
    same = [_alike(number, *both) for number, both in enumerate(zip(arrays, model, strict=True))]
    if res.num_examples <= 0:
        raise UnsoundError(f"says that it trained on {res.num_examples} samples")
    if any(one.dtype != other.dtype for one, other in zip(same, arrays, strict=True)):
        res.parameters = ndarrays_to_parameters(same)
    if res.num_examples > MOST_SAMPLES:
        return f"says that it trained on {res.num_examples} samples"
    for number, (array, limit) in enumerate(zip(same, limits, strict=True)):
        if (largest := _magnitude(array)) > limit:
            return f"returned array {number} with values up to {largest:.3g}, where {limit:.3g} is far"
    return None


def _alike(number: int, array: object, like: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the array with the type in which it is averaged; UnsoundError if it is none of the model's."""
    if not isinstance(array, np.ndarray):  # numpy reads archives of several too
        raise UnsoundError(f"returned array {number} as a {type(array).__name__}")
    if array.shape != like.shape:
        raise UnsoundError(f"returned array {number} of shape {array.shape}, the model's is {like.shape}")
    if array.dtype.kind != like.dtype.kind:
        raise UnsoundError(f"returned array {number} of type {array.dtype}, the model's is {like.dtype}")
    if not np.isfinite(array).all():
        raise UnsoundError(f"returned array {number} with values that are not finite")
    with np.errstate(all="ignore"):
        same = array.astype(like.dtype, copy=False)
    if same is not array and not np.array_equal(same, array):
        types = f"of type {array.dtype}, whose values the model's {like.dtype} cannot hold"
        raise UnsoundError(f"returned array {number} {types}")
    # Flower scales arrays in their own type, in which a share of 1 is 0 where that is an integer's.
    return same if like.dtype.kind in "fc" else same.astype(np.float64)


def as_model(model: NDArrays, average: NDArrays) -> NDArrays | None:
    """Give an average the model's types; None if it has overflown."""
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
    """What a round's metrics are, by name and type. The majority of its clients decides, whoever comes first.

    Attributes
    ----------
    numbers : frozenset of str
        Those that are numbers, where they are given.
    required : frozenset of str
        Those that are missed where they are not.
    """

    numbers: frozenset[str]
    required: frozenset[str]

    @classmethod
    def of(cls, answers: Sequence[Metrics], known: Metrics) -> "DueMetrics":
        """Find out from all answers, and from the metrics that the server knows for itself."""
        given = Counter(name for metrics in answers for name in metrics if _is_number(metrics[name]))
        numbers = {name for name, count in given.items() if 2 * count >= len(answers)}
        numbers |= {name for name, value in known.items() if _is_number(value)}
        required = {name for name, count in given.items() if 2 * count > len(answers)}
        return cls(frozenset(numbers), frozenset(required))

    def check(self, metrics: Metrics) -> None:
        """Raise UnsoundError if a client's metrics are not what they should be."""
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UnsoundError(f"returned the metric {name!r:.80} as {value}")
            if name in self.numbers and not _is_number(value):
                raise UnsoundError(
                    f"returned the metric {name!r:.80} as a {type(value).__name__}, which is no number"
                )
        for name in sorted(self.required - metrics.keys()):
            raise UnsoundError(f"returned no metric {name!r:.80}, which most others did")


def check_evaluation(due: DueMetrics, total: int, res: EvaluateRes) -> str | None:
    """Check that a client's evaluation can be averaged over `total` samples; as :func:`check_fit`."""
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
    """Average the losses of clients, and each metric that all give as a number, by their samples."""
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
