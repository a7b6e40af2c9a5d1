"""Ctrl+C and SIGTERM: end everything at once, and say so in one line.

Imports next to nothing: until it stands, Ctrl+C shows a traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

TYPE_CHECKING = False  # type checkers take it for typing's
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

__all__ = ["Ending"]

GRACE_SECONDS = 2.0


def _nothing() -> None:
    return None


class Ending:
    """Ends the process on a signal: what was put in order first, then out, whatever still hangs in gRPC.

    Workers notice the end of this process by themselves, so nothing depends on that order. A second signal
    does not wait for it. What an app forks here, as a pool of multiprocessing does, has the handlers of
    before: its signals are not ours. As a context it gives those handlers back in the end.
    """

    def __init__(self) -> None:
        self._hush: Callable[[], object] | None = None
        self._stop: Callable[[], object] | None = None
        self._advice: Callable[[], str | None] = _nothing
        self._code: int | None = None
        self._leaving: threading.Thread | None = None
        self._pid = os.getpid()
        is_main = threading.current_thread() is threading.main_thread()  # which alone hears of signals
        numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.restore)

    def __enter__(self) -> Ending:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.restore()

    def prepare(
        self,
        *,
        hush: Callable[[], object] | None = None,
        stop: Callable[[], object] | None = None,
        advice: Callable[[], str | None] | None = None,
    ) -> None:
        """Have something done first; what is not given stays as it was.

        Parameters
        ----------
        hush : callable, optional
            Gives the terminal back, before anything is said.
        stop : callable, optional
            Ends the workers.
        advice : callable, optional
            Returns what the user may do next, or None.
        """
        self._hush = hush or self._hush
        self._stop = stop or self._stop
        self._advice = advice or self._advice

    def settle(self) -> None:
        """Wait for the end, if one has begun: called before a failure is reported that it has caused."""
        if self._leaving is not None:
            self._leaving.join()

    def leave(self, code: int) -> NoReturn:
        """End everything as after a signal, without a word, and this process with it; from any thread."""
        if self._code is None:
            self._begin(code, None)
        assert self._leaving is not None
        self._leaving.join()
        os._exit(code)

    def restore(self) -> None:
        """Give signals back to who had them before."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # it came between a fork and what that restores
            self.restore()
            signal.raise_signal(number)
            return
        if self._code is not None:
            os._exit(self._code)
        if self._hush is None and self._stop is None:
            self._code = 128 + number
            self._end(number)
            os._exit(self._code)
        self._begin(128 + number, number)

    def _begin(self, code: int, number: int | None) -> None:
        """End everything in a thread: this one may hold a lock that is needed."""
        self._code = code
        ending = threading.Thread(target=self._end, args=(number,), daemon=True)
        ending.start()
        self._leaving = threading.Thread(target=self._leave_after, args=(ending, code), daemon=True)
        self._leaving.start()

    def _end(self, number: int | None) -> None:
        if self._hush is not None:
            self._hush()
        if number is not None:
            self._tell(signal.Signals(number).name)
        if self._stop is not None:
            self._stop()

    def _tell(self, name: str) -> None:
        says = f"\nfedexec: {name}"
        if self._stop is not None:
            advice = self._advice()
            says += ": ending all workers" + (f"\nfedexec: {advice}" if advice else "")
        try:
            print(says, file=sys.stderr, flush=True)
        except (OSError, ValueError):  # nobody reads it any more
            pass

    def _leave_after(self, ending: threading.Thread, code: int) -> None:
        ending.join(GRACE_SECONDS)
        try:
            sys.stdout.flush()
        except (OSError, ValueError, AttributeError):  # nobody reads it, or it was closed before we came
            pass
        os._exit(code)
