"""What an executor gives its user: the future of a task, and counts of what the executor has done."""

import concurrent.futures
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from fedexec.errors import InitializerError, PreloadError
from fedexec.interface import Usage

__all__ = ["Future", "Stats", "copy_of"]

T = TypeVar("T")


class Future(concurrent.futures.Future[T]):
    """A :class:`concurrent.futures.Future` that also has the usage of its task.

    Attributes
    ----------
    usage : Usage or None
        Usage of the task, set when the task is done; None before that, and None if the worker died.
    started, ended : float or None
        When the task was first given to a worker, and when its outcome was known, in seconds since the
        epoch as :func:`time.time` counts them. None before that, and None if the task was cancelled.
    """

    usage: Usage | None = None
    started: float | None = None
    ended: float | None = None

    def result(self, timeout: float | None = None) -> T:
        """Return the value of the task, or raise its exception.

        Unlike the method of the base class, this also raises an exception that is false as a condition
        (gh-132063).

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait for the task; by default there is no limit.

        Returns
        -------
        object
            What the function returned.

        Raises
        ------
        TimeoutError
            The task is not done after `timeout` seconds.
        CancelledError
            The task was cancelled.
        """
        error = self.exception(timeout)
        if error is None:
            return super().result()
        try:
            raise error
        finally:
            del self, error  # avoid a reference cycle: the traceback of the error holds this frame


@dataclass(frozen=True, slots=True)
class Stats:
    """Counts of what an executor has done so far. Fields without a description are numbers of tasks.

    Attributes
    ----------
    restarts : mapping of str to int
        Number of workers that were replaced because of a limit, by cause ("host memory" or "device memory").
    learning : mapping of str to object
        Modules that the template has learnt; see :meth:`Learner.report
        <fedexec._channel.template_learning.Learner.report>`. Empty if workers are not forked from a template.
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
        """Return the counts as a dictionary that :mod:`json` can write."""
        return asdict(self)


def copy_of(error: InitializerError | PreloadError) -> Exception:
    """Make an exception for each future: an exception that futures share would collect their tracebacks.

    Parameters
    ----------
    error : InitializerError or PreloadError
        Has made the executor useless.

    Returns
    -------
    Exception
        Of the same class, with the same cause.
    """
    copy = type(error)(*error.args)
    copy.__cause__ = error.__cause__
    return copy
