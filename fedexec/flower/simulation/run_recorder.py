"""What happens in a run, as its messages tell it: starts of strategies, their rounds, each message's cost."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import ArrayRecord, Message

from fedexec.flower.history import Round, TaskRecord
from fedexec.flower.round_recorder import Progress, RoundRecorder

__all__ = ["RunRecorder", "server_round_of"]


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
        self._starts: list[RoundRecorder] = []
        self._of_thread = threading.local()  # its `start`: the one that this thread is in

    @property
    def rounds(self) -> list[Round]:
        """The rounds of each start. Round 0 is the initial model, and what the app asks its nodes before."""
        with self._lock:
            return [current for start in self._starts for current in start.rounds]

    @contextlib.contextmanager
    def start(self, planned: int | None) -> Iterator["RoundRecorder"]:
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

    def within(self) -> "RoundRecorder | None":
        """Return the start that this thread is in; None if it is in none."""
        return getattr(self._of_thread, "start", None)

    def returned(self, start: "RoundRecorder", result: Any, arrays: ArrayRecord | None) -> None:
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
            recorder = self._starts[current.start - 1]
            if failed:
                recorder.failed(current, record.client, record.error)
            recorder.answered(current, record.kind)

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

    def _begin(self, outer: "RoundRecorder | None") -> "RoundRecorder":
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

    def _append(self, *, by_strategy: bool) -> "RoundRecorder":
        self._starts.append(RoundRecorder(len(self._starts) + 1, self._on_progress, by_strategy=by_strategy))
        return self._starts[-1]

    def _start_of(self, kind: str = "", server_round: int | None = None) -> "RoundRecorder":
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


def server_round_of(message: Message) -> int | None:
    """Return the round that a message belongs to, if it says so."""
    for record in message.content.config_records.values():
        value = record.get("server-round")
        if isinstance(value, int):
            return value
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else None
