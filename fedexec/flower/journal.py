"""What happens in a run, as its messages tell it: rounds, failures, what each message cost."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import Message

from fedexec.flower.history import Round, TaskRecord

__all__ = ["Journal", "server_round_of"]

Progress = Callable[[Round, int, int | None], object]


class Journal:
    """Follows one run.

    Attributes
    ----------
    rounds : list of Round
        Round 0 is the initial model, where the strategy evaluates it.
    tasks : list of TaskRecord
        One a message.
    planned : int or None
        How many rounds there will be, once the strategy has said so.
    result : object
        What the strategy returned: a Result, or a History from an older app.

    Parameters
    ----------
    on_progress : callable
        ``on_progress(round, done, planned)`` after each answer to a train message and, with `round.seconds`
        set, when a round is over.
    """

    def __init__(self, on_progress: Progress = lambda round_, done, planned: None) -> None:
        self.rounds: list[Round] = []
        self.tasks: list[TaskRecord] = []
        self.planned: int | None = None
        self.result: Any = None
        self._on_progress = on_progress
        self._begun = self._last = time.perf_counter()
        self._done = 0

    def sent(self, kind: str, partition: int, server_round: int | None) -> None:
        """Note a message that leaves for a node."""
        current = self._round(server_round)
        if kind == "train":
            current.clients.append(partition)

    def answered(self, record: TaskRecord, *, failed: bool) -> None:
        """Note what became of it; an error that nobody has waited to hear of is no failure."""
        self.tasks.append(record)
        current = self._round(record.server_round)
        if failed:
            current.failures.append({"client": record.client, "reason": record.error})
        if record.kind == "train":
            self._done += 1
            self._on_progress(current, self._done, self.planned)
        self._last = time.perf_counter()

    def evaluated(self, server_round: int, metrics: Mapping[str, Any] | None) -> None:
        """Note what the strategy's evaluate_fn said of the global model."""
        current = self._round(server_round)
        current.metrics = dict(metrics or {})
        loss = current.metrics.pop("loss", None)
        current.loss = None if loss is None else float(loss)
        self._last = time.perf_counter()
        self._close()

    def finish(self) -> None:
        """Close the last round, and note what only the strategy's result tells."""
        self._close()
        rounds = {current.server_round: current for current in self.rounds}
        for server_round, metrics in getattr(self.result, "evaluate_metrics_clientapp", {}).items():
            if server_round in rounds:
                rounds[server_round].client_metrics = dict(metrics)
        for server_round, loss in getattr(self.result, "losses_centralized", ()):
            rounds.setdefault(server_round, Round(server_round)).loss = loss
        for name, values in getattr(self.result, "metrics_centralized", {}).items():
            for server_round, value in values:
                rounds.setdefault(server_round, Round(server_round)).metrics[name] = value
        self.rounds = [rounds[server_round] for server_round in sorted(rounds)]

    def _round(self, server_round: int | None) -> Round:
        """Return a round, the current one if it is not told; a later one begins, and ends the one before."""
        if server_round is None:
            server_round = self.rounds[-1].server_round if self.rounds else 1
        for current in reversed(self.rounds):
            if current.server_round == server_round:
                return current
        self._close()
        self._begun, self._done = time.perf_counter(), 0
        self.rounds.append(Round(server_round))
        return self.rounds[-1]

    def _close(self) -> None:
        if self.rounds and not self.rounds[-1].seconds:
            current = self.rounds[-1]
            current.clients.sort()
            current.seconds = max(self._last - self._begun, 1e-9)
            self._on_progress(current, self._done, self.planned)


def server_round_of(message: Message) -> int | None:
    """Return the round that a message belongs to, if it says so."""
    for record in message.content.config_records.values():
        value = record.get("server-round")
        if isinstance(value, int):
            return value
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else None
