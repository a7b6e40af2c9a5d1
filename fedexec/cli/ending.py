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
    the end orderly. A second signal does not wait for it. What an app forks here, as a pool of
    multiprocessing does, has the handlers of before: its signals are not ours.

    Parameters
    ----------
    stop : callable
        Ends the workers.
    """

    def __init__(self, stop: Callable[[], object]) -> None:
        self._stop = stop
        self._code: int | None = None
        self._leaving: threading.Thread | None = None
        self._pid = os.getpid()
        self._before = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        os.register_at_fork(after_in_child=self._restore)

    def settle(self) -> None:
        """Wait for the end, if one has begun: called before a failure is reported that it has caused."""
        if self._leaving is not None:
            self._leaving.join()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # it came between a fork and what that restores
            self._restore()
            signal.raise_signal(number)
            return
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
