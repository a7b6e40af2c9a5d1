"""What is noted of a run: its rounds, and what each of its tasks was for and cost. Knows no Flower."""

from dataclasses import asdict, dataclass, field
from typing import Any

from fedexec.interface import Usage

__all__ = ["Round", "TaskRecord", "cost_of"]

Scalar = bool | bytes | float | int | str


@dataclass(slots=True)
class Round:
    """What happened in one round. Round 0 is the initial model, and what an app asks its nodes before.

    Attributes
    ----------
    server_round : int
    loss : float or None
        Of the global model on the server; None without server-side evaluation.
    metrics : dict
        Likewise, ``accuracy`` among them if the evaluation gives it.
    seconds : float
        From sampling to the end of the evaluation.
    clients : list of int
        Which were sampled to train.
    failures : list of dict
        ``client`` (int) and ``reason`` (str) of each that failed.
    remarks : list of dict
        ``client`` and ``reason`` likewise, of each whose result counts, and is odd: absurdly large, say.
    client_loss : float or None
        Mean over the clients that evaluated, if they do.
    client_metrics : dict
        Likewise.
    start : int
        Which start of a strategy it belongs to, where an app has several: each counts its rounds from 1.
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
    start: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return the round as JSON knows it."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TaskRecord:
    """One task of a federation: what it was for, and what it cost.

    Attributes
    ----------
    kind : str
        "fit", "evaluate", "server evaluate" or "prepare"; in a simulation the type of the message.
    client : int or None
        None for the server's tasks.
    server_round : int or None
    error : str or None
        Why it failed; in a simulation also that the run was over before it was done, which is no failure.
    usage : Usage or None
    started, ended : float or None
        When it was given to a worker, and when its outcome was known, in seconds since the epoch.
    start : int
        As of its :class:`Round`.
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
        """Return the record as JSON knows it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> "TaskRecord":
        """Read what :meth:`as_dict` wrote."""
        usage = row["usage"]
        return cls(**row | {"usage": None if usage is None else Usage(**usage)})


def cost_of(future: object) -> dict[str, Any]:
    """Return the fields of a :class:`TaskRecord` that a future tells; only fedexec's tells any."""
    return {name: getattr(future, name, None) for name in ("usage", "started", "ended")}
