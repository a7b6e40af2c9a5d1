"""The record of rounds that both ways of running a federation keep. Knows no Flower."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedexec.flower.history import Round

__all__ = ["Progress", "RoundRecorder"]

Progress = Callable[[Round, int, int | None], object]


class RoundRecorder:
    """The rounds of one start of a strategy; or those that an app makes without any.

    Its owner sees to it that one thread at a time calls its methods.

    Parameters
    ----------
    number : int
        Which start it is; the first is 1.
    on_progress : callable
        ``on_progress(round, done, planned)`` after each answer to a train message and, with `round.seconds`
        set, when a round is over. `planned` is how many rounds there will be, None if nobody has said so.
    by_strategy : bool
        Whether a strategy makes these rounds, and not the app itself.
    rounds : sequence of Round
        Those that were over before, in a run that goes on.

    Attributes
    ----------
    rounds : list of Round
    planned : int or None
        How many rounds there will be.
    result : object
        What the strategy returned.
    is_over : bool
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
        """Return whether a node was sent a train message."""
        return any(current.clients for current in self.rounds)

    def is_repeated_by(self, server_round: int | None) -> bool:
        """Return whether a train message of that round does not belong here, as rounds only go up."""
        if self.by_strategy or server_round is None:
            return False
        return any(current.clients and current.server_round > server_round for current in self.rounds)

    def answered(self, current: Round, kind: str) -> None:
        """Note that a message has its answer, maybe when its round is long over."""
        self._last = time.perf_counter()
        if kind == "train" and current is self.rounds[-1] and not current.seconds:
            self._done += 1
            self._on_progress(current, self._done, self.planned)

    def trains(self, current: Round, clients: Sequence[int]) -> None:
        """Note which clients were sampled to train in a round, all at once."""
        current.clients = list(clients)
        self._on_progress(current, 0, self.planned)

    def failed(self, current: Round, client: int | None, reason: str | None) -> None:
        """Note that a client failed in a round; None is the server."""
        current.failures.append({"client": client, "reason": reason})

    def evaluated(
        self, server_round: int, loss: float | None, metrics: Mapping[str, Any], *, closes: bool
    ) -> None:
        """Note how good the global model is."""
        current = self.round(server_round)
        current.loss, current.metrics = loss, dict(metrics)
        self._last = time.perf_counter()
        if closes:
            self.close()

    def evaluated_by_clients(self, server_round: int, loss: float | None, metrics: Mapping[str, Any]) -> None:
        """Note what the strategy has made of the clients' evaluations."""
        current = self.round(server_round)
        current.client_loss, current.client_metrics = loss, dict(metrics)
        self._last = time.perf_counter()

    def close_now(self) -> None:
        """End the last round, which lasted until now."""
        self._last = time.perf_counter()
        self.close()

    def close(self) -> None:
        """End the last round, which lasted until something was last heard of it."""
        if self.rounds and not self.rounds[-1].seconds:
            current = self.rounds[-1]
            current.clients = sorted(set(current.clients))  # some protocols train a node in several messages
            current.seconds = max(self._last - self._begun, 1e-9)
            self._on_progress(current, self._done, self.planned)

    def end(self) -> None:
        """End the last round, and take nothing any more of what tells no start."""
        self.close()
        self.is_over = True

    def complete(self) -> None:
        """Note what only the strategy's result tells, and sort the rounds."""
        told = self.result
        for server_round, metrics in getattr(told, "evaluate_metrics_clientapp", {}).items():
            self._of(server_round).client_metrics = dict(metrics)
        for server_round, loss in getattr(told, "losses_centralized", ()):
            self._of(server_round).loss = loss
        for server_round, loss in getattr(told, "losses_distributed", ()):
            self._of(server_round).client_loss = loss
        for server_round, name, value in _by_round(getattr(told, "metrics_centralized", {})):
            self._of(server_round).metrics[name] = value
        for server_round, name, value in _by_round(getattr(told, "metrics_distributed", {})):
            self._of(server_round).client_metrics[name] = value
        self.rounds.sort(key=lambda current: current.server_round)

    def round(self, server_round: int | None, kind: str = "") -> Round:
        """Return a round; one that was not there begins, and ends the one before.

        A message that does not tell its round belongs to the current one; before the first that trains there
        is round 0.
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
        return self._of(server_round)

    def _of(self, server_round: int) -> Round:
        for current in self.rounds:
            if current.server_round == server_round:
                return current
        self.rounds.append(Round(server_round, start=self.number))
        return self.rounds[-1]


def _by_round(metrics: Mapping[str, list[tuple[int, Any]]]) -> Iterator[tuple[int, str, Any]]:
    """Take apart what a History says of metrics: of each name, the values of the rounds."""
    for name, values in metrics.items():
        for server_round, value in values:
            yield server_round, name, value
