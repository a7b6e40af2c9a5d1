"""The record of a run: its rounds, and the purpose and cost of each task. Imports nothing of Flower."""

from dataclasses import asdict, dataclass, field
from typing import Any

from fedexec.interface import Usage

__all__ = ["Round", "TaskRecord"]

Scalar = bool | bytes | float | int | str


@dataclass(slots=True)
class Round:
    """What happened in one round; round 0 is the initial model, and what an app asks nodes before training.

    Attributes
    ----------
    server_round : int
    loss : float or None
        Loss of the global model on the server; None without server-side evaluation.
    metrics : dict
        Metrics of the same evaluation; ``accuracy`` is among them if the evaluation returns it.
    seconds : float
        Time from sampling to the end of the evaluation.
    clients : list of int
        Clients that were sampled to train.
    failures : list of dict
        ``client`` (int) and ``reason`` (str) for each client that failed.
    remarks : list of dict
        ``client`` and ``reason`` for each client whose result counts but is suspicious, for instance absurdly
        large.
    client_loss : float or None
        Mean over the clients that evaluated, if any.
    client_metrics : dict
        Means of the same clients.
    train_metrics : dict
        Means of the clients that trained.
    start : int
        Number of the strategy's start, because an app may start several strategies, each of which counts its
        rounds from 1.
    """

    server_round: int
    loss: float | None = None
    metrics: dict[str, Scalar] = field(default_factory=dict)
    seconds: float = 0.0
    clients: list[int] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[dict[str, Any]] = field(default_factory=list)
    client_loss: float | None = None
    client_metrics: dict[str, Scalar] = field(default_factory=dict)
    train_metrics: dict[str, Scalar] = field(default_factory=dict)
    start: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return the round as JSON-compatible values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One task of a federation: its purpose and its cost.

    Attributes
    ----------
    kind : str
        "fit", "evaluate", "server evaluate" or "prepare"; in a simulation, the type of the message.
    client : int or None
        None for tasks of the server.
    server_round : int or None
    error : str or None
        Why the task failed. In a simulation, also that the run was over before the task was done, which is
        not a failure.
    usage : Usage or None
    started, ended : float or None
        When a worker got the task, and when the outcome was known, in seconds since the epoch.
    start : int
        As in :class:`Round`.
    """

    kind: str
    client: int | None
    server_round: int | None
    error: str | None
    usage: Usage | None = None
    started: float | None = None
    ended: float | None = None
    start: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON-compatible values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "TaskRecord":
        """Make a record from what :meth:`as_dict` returned.

        Parameters
        ----------
        row : dict

        Returns
        -------
        TaskRecord
        """
        usage = row["usage"]
        return cls(**row | {"usage": None if usage is None else Usage(**usage)})
