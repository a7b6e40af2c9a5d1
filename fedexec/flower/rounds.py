"""What ends a run, and which results are none."""

import math

import numpy as np
from flwr.common import EvaluateRes, FitRes, NDArrays, parameters_to_ndarrays

from fedexec.errors import FedexecError

__all__ = ["RoundFailedError", "unlike", "unsound"]


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


def unlike(model: NDArrays, res: FitRes) -> str | None:
    """Return why a client's weights cannot be averaged into the model; None if they can."""
    try:
        arrays = parameters_to_ndarrays(res.parameters)
    except Exception as exc:  # whatever numpy says to bytes that are no array
        return f"returned what cannot be read as arrays: {exc}"
    if len(arrays) != len(model):
        return f"returned {len(arrays)} arrays, the model has {len(model)}"
    for number, (array, like) in enumerate(zip(arrays, model, strict=True)):
        if array.shape != like.shape:
            return f"returned array {number} of shape {array.shape}, the model's is {like.shape}"
        if array.dtype.kind not in "fiubc":
            return f"returned array {number} of type {array.dtype}"
        if not np.isfinite(array).all():
            return f"returned array {number} with values that are not finite"
    return None if res.num_examples > 0 else f"says that it trained on {res.num_examples} samples"


def unsound(res: EvaluateRes) -> str | None:
    """Return why a client's evaluation cannot be averaged; None if it can."""
    if not math.isfinite(res.loss):
        return f"returned a loss of {res.loss}"
    return None if res.num_examples > 0 else f"says that it evaluated on {res.num_examples} samples"
