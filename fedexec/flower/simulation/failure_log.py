"""What is logged of nodes that fail: the first failure of a kind with its traceback, the others in short."""

import logging
import re

__all__ = ["FailureLog"]

log = logging.getLogger("fedexec.flower")


class FailureLog:
    """Logs failures as they happen. Its owner makes sure that one thread at a time calls it.

    Failures whose reasons differ in numbers only, such as that of a process, are of one kind. With thousands
    of nodes and rounds, hundreds of equal lines would hide all others.
    """

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def note(self, where: str, reason: str, traceback: str) -> None:
        """Log a failure.

        Parameters
        ----------
        where : str
            Which node has failed.
        reason : str
            In one line.
        traceback : str
            Traceback of the app's exception; empty if there is none.
        """
        kind = re.sub(r"\d+", "", reason)
        is_new = kind not in self._kinds
        self._kinds.add(kind)
        if is_new and traceback:
            log.warning("%s: %s\n%s", where, reason, traceback.rstrip())
        else:
            log.log(logging.WARNING if is_new else logging.INFO, "%s: %s", where, reason)
