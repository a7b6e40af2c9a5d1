"""What a person sees of `fedexec bench` on a terminal: a bar, and above it a line for each benchmark."""

import sys
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

from fedexec._bench.progress import Progress, time_left
from fedexec._system.control_characters import visible

__all__ = ["BenchBar"]


class BenchBar(Progress):
    """Shows a bar on standard error; a context manager."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=1.0, left="")

    def __enter__(self) -> "BenchBar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str, *, is_failure: bool = False) -> None:
        """Show a line above the bar."""
        self._console.print(visible(text), style="red" if is_failure else None, soft_wrap=True)

    def advance(self, what: str, share: float, seconds_left: float) -> None:
        """Move the bar."""
        self._bar.update(self._task, description=what, completed=share, left=time_left(seconds_left).strip())

    def ended(self, text: str, seconds_left: float, *, is_failure: bool) -> None:
        """Show a line for a benchmark; the bar tells the time that is left."""
        self.say(text, is_failure=is_failure)
