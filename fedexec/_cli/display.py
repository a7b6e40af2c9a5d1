"""What a person sees of a run: a bar while a round goes on, a line when it is over, a table at the end."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedexec._report.numbers import count
from fedexec._scheduling.futures import Stats
from fedexec._system.sizes import format_size
from fedexec._system.visible import visible
from fedexec.flower import Round, TaskRecord
from fedexec.memory.timeline import Timeline
from fedexec.settings import Settings

__all__ = ["Display"]

WRITTEN_OUT = 1e15
BETWEEN_LINES = 5.0  # seconds


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
    on_closed : callable
        Called when nobody reads what is shown any more, as behind ``| head``.
    """

    def __init__(
        self,
        rounds: int | None,
        *,
        quiet: bool,
        stderr: bool = False,
        on_closed: Callable[[], object] = lambda: None,
    ) -> None:
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

    def chosen(self, settings: Settings, *, nodes: str | None = None) -> None:
        """Say what runs, and who chose it."""
        source = settings.sources.get("backend", "default")
        self._console.print(
            f"{f'{nodes}, ' if nodes else ''}backend {settings.backend} ({source}), "
            f"{'at most ' if settings.auto else ''}{settings.max_workers} workers, "
            f"{settings.threads_per_worker} thread(s) each",
            soft_wrap=True,
        )

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
        self._console.print(
            f"{_name(current, rounds)}  loss {_number(current.loss)}  "
            f"accuracy {_number(_accuracy(current.metrics))}  {_of_clients(current)}{current.seconds:.1f} s",
            soft_wrap=True,
        )
        for failure in current.failures:
            line = visible(f"  client {failure['client']}: {failure['reason']}")
            self._console.print(line, style="red", soft_wrap=True)
        for remark in current.remarks:
            line = f"  client {remark['client']}: {remark['reason']}; it counts all the same"
            self._console.print(line, style="yellow", soft_wrap=True)

    def table(self, rounds: list[Round], stats: Stats, tasks: list[TaskRecord], timeline: Timeline) -> None:
        """Print the rounds and what they cost."""
        several = any(current.start > 1 for current in rounds)
        evaluated = any(current.client_metrics for current in rounds)
        table = Table(
            *(["start"] if several else []), "round", "loss", "accuracy", "clients", "failed", "seconds",
            *(["clients' accuracy"] if evaluated else []),
        )  # fmt: skip
        for column in table.columns:
            column.justify = "right"
        for current in rounds:
            row = [str(current.start)] if several else []
            row += [
                str(current.server_round),
                _number(current.loss),
                _number(_accuracy(current.metrics)),
                str(len(current.clients)),
                str(len(current.failures)),
                f"{current.seconds:.1f}",
            ]
            if evaluated:
                row.append(_number(_accuracy(current.client_metrics)))
            table.add_row(*row)
        self._console.print(table)
        usages = [task.usage for task in tasks if task.usage is not None]
        peaks = [usage.peak_host_bytes for usage in usages if usage.peak_host_bytes is not None]
        workers = {usage.worker_pid for usage in usages}
        self._console.print(
            f"{count(len(tasks), 'task')} in {count(len(workers), 'process', 'processes')}, "
            f"peak {format_size(max(peaks, default=None))}; "
            f"{stats.worker_deaths} died, {stats.timeouts} timed out, {stats.retries} run again"
        )
        self._console.print(
            f"all processes together: peak {format_size(timeline.host.peak)} of the host's memory"
        )
        for device in timeline.watched:
            after_round, at_end = (
                timeline.residual_bytes(device.uuid, label) for label in ("round", "shutdown")
            )
            name = visible(device.name)
            self._console.print(
                f"{name}: peak {format_size(timeline.devices[device.uuid].peak)}; left after a round "
                f"{format_size(after_round)}, at the end {format_size(at_end)}"
            )


def _name(current: Round, rounds: int | None) -> str:
    start = (
        f"start {current.start}, " if current.start > 1 else ""
    )  # that there are several shows with the 2nd
    return f"{start}round {current.server_round}" + (f"/{rounds}" if rounds else "")


def _of_clients(current: Round) -> str:
    """Return what the clients' own evaluations say, as far as there are any."""
    found = {"clients' loss": current.client_loss, "clients' accuracy": _accuracy(current.client_metrics)}
    return "".join(f"{name} {_number(value)}  " for name, value in found.items() if value is not None)


def _accuracy(metrics: Mapping[str, Any]) -> Any:
    """Return the accuracy, whatever an app has called it."""
    names = sorted((name for name in metrics if "acc" in name.lower()), key=lambda name: name != "accuracy")
    return metrics[names[0]] if names else None


def _number(value: object) -> str:
    if not isinstance(value, int | float):
        return "not measured"
    try:
        return f"{value:.4f}" if abs(value) < WRITTEN_OUT else f"{value:.4g}"
    except OverflowError:  # clients may answer whole numbers of any size
        return "inf" if value > 0 else "-inf"
