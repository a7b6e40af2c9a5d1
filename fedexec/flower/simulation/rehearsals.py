"""Rehearsals: the template also handles the first message of each type; workers inherit its caches."""

import functools
import logging
import threading
from collections import Counter

from fedexec.errors import PreloadError
from fedexec.executor import Executor
from fedexec.flower.simulation.client_app import AppFirst, MessageTask, answer_or_raise

__all__ = ["Rehearsals"]

log = logging.getLogger("fedexec.flower")

ATTEMPTS = 3  # attempts for each type of message, until one succeeds


class Rehearsals:
    """Rehearses messages on an executor, once for each type.

    Parameters
    ----------
    executor : Executor
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._lock = threading.Lock()  # guards the next attribute
        self._attempts: Counter[str] = Counter()  # number of attempts, by type of message

    def rehearse(self, task: MessageTask) -> None:
        """Rehearse a message, unless one of its type was rehearsed before; see :meth:`Executor.rehearse`.

        Parameters
        ----------
        task : MessageTask
        """
        kind = task.metadata.message_type
        # Other messages of this type wait, because their workers are to inherit the result.
        with self._lock:
            if self._attempts[kind] >= ATTEMPTS:
                return
            self._attempts[kind] += 1
            try:
                self._executor.rehearse(AppFirst(task.app, functools.partial(answer_or_raise, task)))
                self._attempts[kind] = ATTEMPTS
            except PreloadError as exc:
                log.warning("workers inherit nothing of the rehearsal of %r: %s", kind, str(exc))
