"""Ctrl+C and SIGTERM: end everything at once, and say so in one line."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["Ending"]

GRACE_SECONDS = 2.0


class Ending:
    """Ends the process on a signal: `stop` first, then out, whatever still hangs in gRPC.

    Workers notice the end of this process by themselves, so nothing depends on `stop` succeeding; it makes
    the end orderly. A second signal does not wait for it.

    Parameters
    ----------
    stop : callable
        Ends the workers.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        self._stop = stop
        self._code: int | None = None
        self._leaving: threading.Thread | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def settle(self) -> None:
        """Wait for the end, if one has begun: called before a failure is reported that it has caused."""
        if self._leaving is not None:
            self._leaving.join()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._code is not None:
            os._exit(self._code)
        self._code = 128 + number
        print(f"\nfedexec: {signal.Signals(number).name}: ending all workers", file=sys.stderr, flush=True)
        # In a thread: this one may hold a lock that `stop` needs.
        stopping = threading.Thread(target=self._stop, daemon=True)
        stopping.start()
        self._leaving = threading.Thread(target=self._leave_after, args=(stopping,), daemon=True)
        self._leaving.start()

    def _leave_after(self, stopping: threading.Thread) -> None:
        stopping.join(GRACE_SECONDS)
        sys.stdout.flush()
        assert self._code is not None
        os._exit(self._code)
