"""The record of a run, derived from its messages: starts of strategies, rounds, costs of messages."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from flwr.app import ArrayRecord, Message

from fedexec.flower.history import Round, TaskRecord
from fedexec.flower.round_recorder import Progress, RoundRecorder
from fedexec.flower.task_recorder import TaskRecorder

__all__ = ["RunRecorder", "server_round_of"]


class RunRecorder(TaskRecorder):
    """Records one run, which may start several strategies; it can be used from many threads.

    Attributes
    ----------
    tasks : list of TaskRecord
        One per message.
    result : object
        What the last strategy returned: a Result, or a History from an older app.
    arrays : flwr.app.ArrayRecord or None
        The global model at the end of that strategy; None if there is none.

    Parameters
    ----------
    on_progress : callable
        ``on_progress(round, done, planned)``, called after each answer to a train message and, with
        `round.seconds` set, when a round is over. `planned` is the number of rounds, or None if no strategy
        has named it.
    """

    def __init__(self, on_progress: Progress = lambda round_, done, planned: None) -> None:
        super().__init__()
        self.result: Any = None
        self.arrays: ArrayRecord | None = None
        self._on_progress = on_progress
        self._starts: list[RoundRecorder] = []  # the lock guards each of them, too
        self._of_thread = threading.local()  # its attribute `start`: the start that this thread is in

    @property
    def rounds(self) -> list[Round]:
        """The rounds of each start; round 0 is the initial model, and what the app asks before training."""
        with self._lock:
            return [current for start in self._starts for current in start.rounds]

    @contextlib.contextmanager
    def start(self, planned: int | None) -> Iterator["RoundRecorder"]:
        """Record a strategy that runs in this thread.

        A start within another one that has not trained yet counts as the same start, because it is a method
        that calls its super's.

        Parameters
        ----------
        planned : int or None
            Number of rounds.

        Yields
        ------
        RoundRecorder
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
        """Return the start that this thread is in; None if there is none."""
        return getattr(self._of_thread, "start", None)

    def returned(self, start: "RoundRecorder", result: Any, arrays: ArrayRecord | None) -> None:
        """Note a strategy's result; if starts are nested, the inner start's result stays: it has the rounds.

        Parameters
        ----------
        start : RoundRecorder
        result : object
            A Result or a History.
        arrays : ArrayRecord or None
            The global model.
        """
        with self._lock:
            if start.result is None:
                start.result = result
            self.result, self.arrays = result, arrays

    def sent(self, kind: str, partition: int, server_round: int | None) -> Round:
        """Note a message that is sent to a node.

        Parameters
        ----------
        kind : str
            The message's type.
        partition : int
        server_round : int or None

        Returns
        -------
        Round
            The message's round.
        """
        with self._lock:
            current = self._start_of(kind, server_round).round(server_round, kind)
            if kind == "train":
                current.clients.append(partition)
            return current

    def answered(
        self,
        kind: str,
        client: int,
        server_round: int | None,
        error: str | None,
        future: object,
        current: Round | None,
        *,
        failed: bool,
    ) -> TaskRecord:
        """Note the outcome of a message.

        Parameters
        ----------
        kind, client, server_round, error, future
            As in :meth:`ended`; the client is a partition.
        current : Round or None
            Result of :meth:`sent`; None if the message could not be sent.
        failed : bool
            Whether an error counts as a failure: not if no caller has waited for the reply.

        Returns
        -------
        TaskRecord
        """
        with self._lock:
            current = current or self._start_of(kind, server_round).round(server_round, kind)
            record = self.ended(kind, client, server_round, error, future, start=current.start)
            recorder = self._starts[current.start - 1]
            if failed and error is not None:
                recorder.failed(current, client, error)
            recorder.answered(current, kind)
        return record

    def evaluated(
        self, server_round: int, loss: float | None, metrics: Mapping[str, Any], *, closes: bool = False
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
        with self._lock:
            self._start_of().evaluated(server_round, loss, metrics, closes=closes)

    def evaluated_by_clients(self, server_round: int, loss: float | None, metrics: Mapping[str, Any]) -> None:
        """Note the strategy's aggregate of the clients' evaluations.

        Parameters
        ----------
        server_round : int
        loss : float or None
        metrics : mapping
        """
        with self._lock:
            self._start_of().evaluated_by_clients(server_round, loss, metrics)

    def trained(self, server_round: int, metrics: Mapping[str, Any]) -> None:
        """Note the strategy's aggregate of what the clients have measured while they trained.

        Parameters
        ----------
        server_round : int
        metrics : mapping
        """
        with self._lock:
            self._start_of().trained(server_round, metrics)

    def finish(self) -> None:
        """End the last rounds, and add what only the strategies' results contain."""
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
            if not last.has_trained:  # So far the app itself has only asked its nodes something.
                last.by_strategy = True
                return last
            last.end()
        return self._append(by_strategy=True)

    def _append(self, *, by_strategy: bool) -> "RoundRecorder":
        self._starts.append(RoundRecorder(len(self._starts) + 1, self._on_progress, by_strategy=by_strategy))
        return self._starts[-1]

    def _start_of(self, kind: str = "", server_round: int | None = None) -> "RoundRecorder":
        """Return the start that an event of this thread belongs to.

        Strategies may send from threads of their own, as those of older apps do. An app may also train
        without a strategy: a new start begins when it returns to an earlier round.
        """
        of_this_thread = self.within()
        if of_this_thread is not None:
            return of_this_thread
        last = next((start for start in reversed(self._starts) if not start.is_over), None)
        # The app asks its nodes something after the last start.
        if last is None and self._starts and kind != "train":
            return self._starts[-1]
        if last is not None and kind == "train" and last.is_repeated_by(server_round):
            last.end()
            last = None
        return last or self._append(by_strategy=False)


def server_round_of(message: Message) -> int | None:
    """Return the round that a message names.

    Parameters
    ----------
    message : Message

    Returns
    -------
    int or None
        None if the message names no round.
    """
    for record in message.content.config_records.values():
        value = record.get("server-round")
        if isinstance(value, int):
            return value
    group = message.metadata.group_id
    return int(group) if group.isdecimal() else None
