"""What a person sees of a run: a bar while a round goes on, a line when it is over, a table at the end."""

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedexec._cli.run_summary import (
    ending_lines,
    failure_line,
    measured,
    measurements,
    rounds_table,
    who_failed,
)
from fedexec._report.numbers import count
from fedexec._scheduling.futures import Stats
from fedexec._system.control_characters import visible
from fedexec.flower import Round, TaskRecord
from fedexec.memory.timeline import Timeline
from fedexec.settings import Settings
from fedexec.usage import Node

__all__ = ["Display"]

SHOWN_MACHINES = 5
SHOWN_FAILURES = SHOWN_NAMES = 20
BETWEEN_LINES, BETWEEN_LOOKS = 5.0, 0.2  # seconds


class _Console(Console):
    """rich's own would end the thread that happens to write when its reader has gone."""

    on_closed: Callable[[], object]

    def on_broken_pipe(self) -> None:
        self.quiet = True
        self.on_closed()


class Display:
    """Shows the progress of a federation; a context manager.

    Parameters
    ----------
    rounds : int or None
        How many there will be, if that is known.
    quiet : bool
        Show nothing.
    stderr : bool
        Leave stdout to something else.
    failures_are_logged : bool
        Whether the reason of each failure is in the log already.
    on_closed : callable
        Called when nobody reads what is shown any more, as behind ``| head``.
    """

    def __init__(
        self,
        rounds: int | None,
        *,
        quiet: bool,
        stderr: bool = False,
        failures_are_logged: bool = False,
        on_closed: Callable[[], object] = lambda: None,
    ) -> None:
        self._failures_are_logged = failures_are_logged
        # Text of others is text: errors, names and paths may have brackets, which rich would take for markup.
        self._console = _Console(quiet=quiet, stderr=stderr, highlight=False, markup=False, emoji=False)
        self._console.on_closed = on_closed
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("clients"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=quiet or not self._console.is_terminal,
        )
        self._rounds = rounds
        self._there: int | None = None  # clients, as the last line said
        self._said = 0.0  # when that was
        self._bar = self._progress.add_task("waiting for clients", total=None)

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def hush(self) -> None:
        """Give the terminal back, and show nothing from now on: what fails now was ended by us."""
        self._progress.stop()
        self._console.quiet = True
        for name in ("fedexec", "flwr"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Show what Python is importing while an app is loaded, because that may take long."""
        over = threading.Event()

        def show() -> None:
            while not over.wait(BETWEEN_LOOKS):
                newest = list(sys.modules)[-1].partition(".")[0]
                self._progress.update(self._bar, description=f"loading the app: importing {newest}")

        if not self._progress.disable:
            threading.Thread(target=show, name="fedexec-loading", daemon=True).start()
        try:
            yield
        finally:
            over.set()
            self._progress.update(self._bar, description="waiting for the first round")

    def chosen(self, settings: Settings, *, what: str = "", machines: Sequence[Node] = ()) -> None:
        """Say what runs, and who chose it.

        Parameters
        ----------
        settings : Settings
        what : str, optional
            What else to say first.
        machines : sequence of Node
            The nodes of the cluster on which tasks run.
        """
        source = settings.sources.get("backend", "default")
        where = (
            f"{'at most ' if settings.auto else ''}{settings.max_workers} workers, "
            f"{settings.threads_per_worker} thread(s) each"
        )
        if machines:
            slots = min(settings.max_workers, sum(machine.slots for machine in machines))
            hosts = ", ".join(f"{machine.host} ({machine.slots})" for machine in machines[:SHOWN_MACHINES])
            more = f" and {len(machines) - SHOWN_MACHINES} more" if len(machines) > SHOWN_MACHINES else ""
            where = f"{slots} tasks at once on {len(machines)} machine(s): {hosts}{more}"
        said = f"{f'{what}, ' if what else ''}backend {settings.backend} ({source}), {where}"
        self._console.print(said, soft_wrap=True)

    def waiting(self, address: str, there: int, needed: int, *, written: bool = False) -> None:
        """Show how many clients a server waits for.

        Parameters
        ----------
        address : str
            Where it listens.
        there, needed : int
        written : bool
            Where there is no bar, write lines: at once, and as more clients have come.
        """
        said = f"waiting for clients at {address}"
        self._progress.update(self._bar, description=said, total=needed, completed=there)
        if self._console.is_terminal or not written or there == self._there:
            return
        now = time.monotonic()
        if self._there is None or now >= self._said + BETWEEN_LINES:
            self._there, self._said = there, now
            self._console.print(f"{said}: {there} of {needed} are there", soft_wrap=True)

    def progress(self, current: Round, done: int, rounds: int | None = None) -> None:
        """Take note of one more answer, or of the end of a round; and of how many rounds there will be."""
        rounds = rounds or self._rounds
        if current.seconds:
            self._line(current, rounds)
            return
        total = len(current.clients) * rounds if rounds else None
        before = len(current.clients) * (current.server_round - 1)
        self._progress.update(
            self._bar,
            description=_name(current, rounds),
            total=total,
            completed=before + done,
        )

    def _line(self, current: Round, rounds: int | None) -> None:
        if not _has_news(current):
            return
        self._console.print(
            f"{_name(current, rounds)}  {measured(current)}{current.seconds:.1f} s",
            soft_wrap=True,
        )
        if self._failures_are_logged and current.failures:
            who = sorted(
                {str(failure["client"]) for failure in current.failures}, key=lambda each: (len(each), each)
            )
            more = f" and {len(who) - SHOWN_FAILURES} more" if len(who) > SHOWN_FAILURES else ""
            said = f"  {count(len(who), 'client')} failed: {', '.join(who[:SHOWN_FAILURES])}{more}"
            self._console.print(said, style="red", soft_wrap=True)
        for failure in () if self._failures_are_logged else current.failures:
            line = visible(f"  {who_failed(failure)}: {failure['reason']}")
            self._console.print(line, style="red", soft_wrap=True)
        for remark in current.remarks:
            line = f"  client {remark['client']}: {remark['reason']}; it counts all the same"
            self._console.print(line, style="yellow", soft_wrap=True)

    def table(self, rounds: list[Round], stats: Stats, tasks: list[TaskRecord], timeline: Timeline) -> None:
        """Print the rounds and what they cost."""
        shown = [current for current in rounds if _has_news(current)]
        if shown:
            table, left_out = rounds_table(shown, self._console.width)
            self._console.print(table)
            if left_out:
                more = f" and {len(left_out) - SHOWN_NAMES} more" if len(left_out) > SHOWN_NAMES else ""
                said = f"no space here, but in --json: {', '.join(left_out[:SHOWN_NAMES])}{more}"
                self._console.print(said, soft_wrap=True)
        for line in ending_lines(rounds, stats, tasks, timeline):
            self._console.print(line)
        failed = failure_line(rounds, tasks)
        if failed is not None:
            self._console.print(failed, style="red", soft_wrap=True)


def _has_news(current: Round) -> bool:
    """Return whether there is anything to tell of a round; of round 0 there often is not."""
    return bool(current.server_round or current.clients or current.failures or measurements(current))


def _name(current: Round, rounds: int | None) -> str:
    start = f"start {current.start}, " if current.start > 1 else ""  # the 2nd shows that there are several
    return f"{start}round {current.server_round}" + (f"/{rounds}" if rounds else "")
