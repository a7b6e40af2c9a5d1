"""The record of rounds, shared by both ways to run a federation. Imports nothing of Flower."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedexec.flower.history import Round

__all__ = ["Progress", "RoundRecorder"]

Progress = Callable[[Round, int, int | None], object]


class RoundRecorder:
    """The rounds of one start of a strategy, or the rounds that an app makes without a strategy.

    The owner makes sure that only one thread at a time calls its methods.

    Parameters
    ----------
    number : int
        Number of the start; the first is 1.
    on_progress : callable
        ``on_progress(round, done, planned)``, called after each answer to a train message and, with
        `round.seconds` set, when a round is over. `planned` is the number of rounds, or None if it is
        unknown.
    by_strategy : bool
        Whether a strategy makes these rounds, and not the app itself.
    rounds : sequence of Round
        Earlier rounds of a run that is resumed.

    Attributes
    ----------
    rounds : list of Round
    planned : int or None
        Number of rounds that are planned.
    result : object
        What the strategy returned.
    is_over : bool
        Whether the start has ended.
    """

    def __init__(
        self, number: int, on_progress: Progress, *, by_strategy: bool, rounds: Sequence[Round] = ()
    ) -> None:
        self.number = number
        self.by_strategy = by_strategy
        self.rounds = list(rounds)
        self.planned: int | None = None
        self.result: Any = None
        self.is_over = False
        self._on_progress = on_progress
        self._begun = self._last = time.perf_counter()
        self._done = 0

    @property
    def has_trained(self) -> bool:
        """Whether a node was sent a train message."""
        return any(current.clients for current in self.rounds)

    def is_repeated_by(self, server_round: int | None) -> bool:
        """Return whether a train message's round is lower than an earlier one, and so begins a new start.

        Parameters
        ----------
        server_round : int or None
            The message's round.

        Returns
        -------
        bool
        """
        if self.by_strategy or server_round is None:
            return False
        return any(current.clients and current.server_round > server_round for current in self.rounds)

    def answered(self, current: Round, kind: str) -> None:
        """Note that a message has its answer, possibly long after its round.

        Parameters
        ----------
        current : Round
            The message's round.
        kind : str
            The message's type.
        """
        self._last = time.perf_counter()
        if kind == "train" and current is self.rounds[-1] and not current.seconds:
            self._done += 1
            self._on_progress(current, self._done, self.planned)

    def trains(self, current: Round, clients: Sequence[int]) -> None:
        """Note all clients that were sampled to train in a round.

        Parameters
        ----------
        current : Round
        clients : sequence of int
        """
        current.clients = list(clients)
        self._on_progress(current, 0, self.planned)

    def failed(self, current: Round, client: int | None, reason: str | None) -> None:
        """Note that a client has failed in a round.

        Parameters
        ----------
        current : Round
        client : int or None
            None for the server.
        reason : str or None
        """
        current.failures.append({"client": client, "reason": reason})

    def evaluated(
        self, server_round: int, loss: float | None, metrics: Mapping[str, Any], *, closes: bool
    ) -> None:
        """Note the evaluation of the global model on the server.

        Parameters
        ----------
        server_round : int
        loss : float or None
        metrics : mapping
        closes : bool
            Whether the evaluation ends the round.
        """
        current = self.round(server_round)
        current.loss, current.metrics = loss, dict(metrics)
        self._last = time.perf_counter()
        if closes:
            self.close()

    def evaluated_by_clients(self, server_round: int, loss: float | None, metrics: Mapping[str, Any]) -> None:
        """Note the strategy's aggregate of the clients' evaluations.

        Parameters
        ----------
        server_round : int
        loss : float or None
        metrics : mapping
        """
        current = self.round(server_round)
        current.client_loss, current.client_metrics = loss, dict(metrics)
        self._last = time.perf_counter()

    def trained(self, server_round: int, metrics: Mapping[str, Any]) -> None:
        """Note the strategy's aggregate of what the clients have measured while they trained.

        Parameters
        ----------
        server_round : int
        metrics : mapping
        """
        self.round(server_round).train_metrics = dict(metrics)
        self._last = time.perf_counter()

    def close_now(self) -> None:
        """End the last round now."""
        self._last = time.perf_counter()
        self.close()

    def close(self) -> None:
        """End the last round at the time of the last note about it."""
        if self.rounds and not self.rounds[-1].seconds:
            current = self.rounds[-1]
            current.clients = sorted(set(current.clients))  # Some protocols train a node in several messages.
            current.seconds = max(self._last - self._begun, 1e-9)
            self._on_progress(current, self._done, self.planned)

    def end(self) -> None:
        """End the last round and this start, so that messages without a start no longer belong to it."""
        self.close()
        self.is_over = True

    def complete(self) -> None:
        """Add what only the strategy's result contains, and sort the rounds."""
        result = self.result
        for name, kind in (
            ("evaluate_metrics_clientapp", "client_metrics"),
            ("train_metrics_clientapp", "train_metrics"),
        ):
            for server_round, metrics in getattr(result, name, {}).items():
                setattr(self._find_or_add(server_round), kind, dict(metrics))
        for server_round, loss in getattr(result, "losses_centralized", ()):
            self._find_or_add(server_round).loss = loss
        for server_round, loss in getattr(result, "losses_distributed", ()):
            self._find_or_add(server_round).client_loss = loss
        for server_round, name, value in _by_round(getattr(result, "metrics_centralized", {})):
            self._find_or_add(server_round).metrics[name] = value
        for server_round, name, value in _by_round(getattr(result, "metrics_distributed", {})):
            self._find_or_add(server_round).client_metrics[name] = value
        for server_round, name, value in _by_round(getattr(result, "metrics_distributed_fit", {})):
            self._find_or_add(server_round).train_metrics[name] = value
        self.rounds.sort(key=lambda current: current.server_round)

    def round(self, server_round: int | None, kind: str = "") -> Round:
        """Return a round; a new round begins with its first note, and ends the round before.

        Parameters
        ----------
        server_round : int or None
            None: the message does not name its round, and belongs to the current one. Before the first
            training, that is round 0.
        kind : str
            The message's type.

        Returns
        -------
        Round
        """
        if server_round is None:
            server_round = self.rounds[-1].server_round if self.rounds else 0
            if kind == "train":
                server_round = max(server_round, 1)
        for current in reversed(self.rounds):
            if current.server_round == server_round:
                return current
        self.close()
        self._begun, self._done = time.perf_counter(), 0
        return self._find_or_add(server_round)

    def _find_or_add(self, server_round: int) -> Round:
        for current in self.rounds:
            if current.server_round == server_round:
                return current
        self.rounds.append(Round(server_round, start=self.number))
        return self.rounds[-1]


def _by_round(metrics: Mapping[str, list[tuple[int, Any]]]) -> Iterator[tuple[int, str, Any]]:
    """Yield round, name and value of each metric of a Flower History, which groups them by name."""
    for name, values in metrics.items():
        for server_round, value in values:
            yield server_round, name, value
