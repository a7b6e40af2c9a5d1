"""What a user gets from an executor: the future of a task, and the counts of what was done."""

import concurrent.futures
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from fedexec.interface import Usage

__all__ = ["Future", "Stats"]

T = TypeVar("T")


class Future(concurrent.futures.Future[T]):
    """A :class:`concurrent.futures.Future` that also knows what its task cost.

    Attributes
    ----------
    usage : Usage or None
        Set when the task is done; None before, and where it was not measured (the worker died).
    started, ended : float or None
        When it was given to a worker for the first time, and when its outcome was known: seconds since the
        epoch, as :func:`time.time`. None before, and of a task that was cancelled.
    """

    usage: Usage | None = None
    started: float | None = None
    ended: float | None = None

    def result(self, timeout: float | None = None) -> T:
        """Return what the task returned, or raise what it raised, even if that is false (gh-132063)."""
        error = self.exception(timeout)
        if error is None:
            return super().result()
        try:
            raise error
        finally:
            del self, error  # its traceback holds this frame: no cycle


@dataclass(frozen=True, slots=True)
class Stats:
    """What an executor has done so far; every field is a number of tasks, but for the last.

    Attributes
    ----------
    restarts : mapping of str to int
        How many workers were replaced because of a limit, by cause: "host memory", "device memory".
    learning : mapping of str to object
        What workers have learnt to be born with; see :meth:`Learner.report
        <fedexec._channel.learning.Learner.report>`. Empty where they are not forked.
    """

    submitted: int
    succeeded: int
    failed: int
    cancelled: int
    running: int
    queued: int
    worker_deaths: int
    timeouts: int
    retries: int
    memory_kills: int
    restarts: Mapping[str, int]
    learning: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON knows them."""
        return asdict(self)
