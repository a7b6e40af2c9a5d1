"""What happens in a run, as its messages tell it: rounds, failures, what each message cost."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flwr.app import ArrayRecord, Message

from fedexec.flower.history import Round, TaskRecord

__all__ = ["RunRecorder", "Start", "server_round_of"]

Progress = Callable[[Round, int, int | None], object]


class RunRecorder:
    """Follows one run, which may start several strategies. Safe to use from many threads.

    Attributes
    ----------
    tasks : list of TaskRecord
        One a message.
    result : object
        What the strategy returned that ended last: a Result, or a History from an older app.
    arrays : flwr.app.ArrayRecord or None
        The global model at its end; None where there is none.

    Parameters
    ----------
    on_progress : callable
        ``on_progress(round, done, planned)`` after each answer to a train message and, with `round.seconds`
        set, when a round is over. `planned` is how many rounds there will be, if a strategy has said so.
    """

    def __init__(self, on_progress: Progress = lambda round_, done, planned: None) -> None:
        self.tasks: list[TaskRecord] = []
        self.result: Any = None
        self.arrays: ArrayRecord | None = None
        self._on_progress = on_progress
        self._lock = threading.RLock()  # guards all of this, and each start
        self._starts: list[Start] = []
        self._of_thread = threading.local()  # its `start`: the one that this thread is in

    @property
    def rounds(self) -> list[Round]:
        """The rounds of each start. Round 0 is the initial model, and what the app asks its nodes before."""
        with self._lock:
            return [current for start in self._starts for current in start.rounds]

    @contextlib.contextmanager
    def start(self, planned: int | None) -> Iterator["Start"]:
        """Follow a strategy that is started in this thread, while this lasts.

        A start within another that has not trained yet is the same: a method that calls its super's.
        """
        outer = self.within()
        with self._lock:
            current = self._begin(outer)
            current.planned = planned
        self._of_thread.start = current
        try:
            yield current
        finally:
            self._of_thread.start = outer
            if outer is not current:
                with self._lock:
                    current.end()

    def within(self) -> "Start | None":
        """Return the start that this thread is in; None if it is in none."""
        return getattr(self._of_thread, "start", None)

    def returned(self, start: "Start", result: Any, arrays: ArrayRecord | None) -> None:
        """Note what a strategy has returned. Of a start within another, the inner one knows its rounds."""
        with self._lock:
            if start.result is None:
                start.result = result
            self.result, self.arrays = result, arrays

    def sent(self, kind: str, partition: int, server_round: int | None) -> Round:
        """Note a message that leaves for a node; return the round that it belongs to."""
        with self._lock:
            current = self._start_of(kind, server_round).round(server_round, kind)
            if kind == "train":
                current.clients.append(partition)
            return current

    def answered(self, record: TaskRecord, current: Round | None, *, failed: bool) -> None:
        """Note what became of a message; an error that nobody has waited to hear of is no failure.

        Parameters
        ----------
        current : Round or None
            What :meth:`sent` returned; None if the message could not leave.
        """
        with self._lock:
            self.tasks.append(record)
            if current is None:
                start = self._start_of(record.kind, record.server_round)
                current = start.round(record.server_round, record.kind)
            if failed:
                current.failures.append({"client": record.client, "reason": record.error})
            self._starts[current.start - 1].answered(current, record.kind)

    def evaluated(
        self, server_round: int, loss: float | None, metrics: Mapping[str, Any], *, closes: bool = False
    ) -> None:
        """Note how good the global model is; `closes` where nothing follows in that round."""
        with self._lock:
            self._start_of().evaluated(server_round, loss, metrics, closes=closes)

    def evaluated_by_clients(self, server_round: int, loss: float | None, metrics: Mapping[str, Any]) -> None:
        """Note what the strategy has made of the clients' evaluations."""
        with self._lock:
            self._start_of().evaluated_by_clients(server_round, loss, metrics)

    def finish(self) -> None:
        """Close the last rounds, and note what only the strategies' results tell."""
        with self._lock:
            for start in self._starts:
                start.end()
                start.complete()

    def _begin(self, outer: "Start | None") -> "Start":
        if outer is not None:
            if not outer.has_trained:
                return outer
            outer.close()
        last = self._starts[-1] if self._starts else None
        if last is not None and not last.by_strategy:
            if not last.has_trained:  # what the app has asked its nodes before
                last.by_strategy = True
                return last
            last.end()
        return self._append(by_strategy=True)

    def _append(self, *, by_strategy: bool) -> "Start":
        self._starts.append(Start(len(self._starts) + 1, self._on_progress, by_strategy=by_strategy))
        return self._starts[-1]

    def _start_of(self, kind: str = "", server_round: int | None = None) -> "Start":
        """Return the start that something belongs to that happens in this thread.

        Strategies may send from threads of their own, as those of older apps do; and an app may train
        without any strategy: it starts again where it goes back to an earlier round.
        """
        mine = self.within()
        if mine is not None:
            return mine
        last = next((start for start in reversed(self._starts) if not start.is_over), None)
        if last is None and self._starts and kind != "train":  # it asks its nodes something after all
            return self._starts[-1]
        if last is not None and kind == "train" and last.is_repeated_by(server_round):
            last.end()
            last = None
        return last or self._append(by_strategy=False)


class Start:
    """The rounds of one start of a strategy; or those that an app makes without any.

    Parameters
    ----------
    number : int
        The first is 1.
    on_progress : callable
        As for :class:`RunRecorder`.
    by_strategy : bool

    Attributes
    ----------
    rounds : list of Round
    planned : int or None
        How many rounds there will be.
    result : object
        What the strategy returned.
    is_over : bool
    """

    def __init__(self, number: int, on_progress: Progress, *, by_strategy: bool) -> None:
        self.number = number
        self.by_strategy = by_strategy
        self.rounds: list[Round] = []
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

    def close(self) -> None:
        """End the last round."""
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


def server_round_of(message: Message) -> int | None:
    """Return the round that a message belongs to, if it says so."""
    for record in message.content.config_records.values():
        value = record.get("server-round")
        if isinstance(value, int):
            return value
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else None
