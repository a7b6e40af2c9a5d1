"""What `fedexec bench` says while it measures: lines, of which a bar of the command line makes more."""

from typing import TextIO

from fedexec._system.control_characters import visible

__all__ = ["Progress", "time_left"]


class Progress:
    """Writes a line for whatever is said.

    Parameters
    ----------
    out : TextIO
    quiet : bool
        Write failures only.
    """

    def __init__(self, out: TextIO, *, quiet: bool = False) -> None:
        self._out = out
        self._quiet = quiet

    def say(self, text: str, *, is_failure: bool = False) -> None:
        """Show a line that stays."""
        if is_failure or not self._quiet:
            print(visible(text), file=self._out, flush=True)

    def advance(self, what: str, share: float, seconds_left: float) -> None:
        """Show how far the measurement is; lines do not.

        Parameters
        ----------
        what : str
            What is being measured.
        share : float
            How much of everything is done, from 0 to 1.
        seconds_left : float
            A guess.
        """

    def ended(self, text: str, seconds_left: float, *, is_failure: bool) -> None:
        """Show a line for a benchmark that has ended, and how long the others may take."""
        self.say(f"{text}{time_left(seconds_left)}", is_failure=is_failure)


def time_left(seconds: float) -> str:
    """Return a guess at the time that is left, as the end of a line; empty if there is none."""
    minutes, rest = divmod(round(seconds), 60)
    return f"   about {minutes}:{rest:02} left" if seconds else ""
