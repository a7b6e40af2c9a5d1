"""What a person sees of a run: a bar while a round goes on, a line when it is over, a table at the end."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fedexec.flower import Round, TaskRecord
from fedexec.memory.timeline import Timeline
from fedexec.scheduler import Stats
from fedexec.settings import Settings, format_size

__all__ = ["Display"]


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
    """

    def __init__(self, rounds: int | None, *, quiet: bool, stderr: bool = False) -> None:
        # Text of others is text: errors, names and paths may have brackets, which rich would take for markup.
        self._console = Console(quiet=quiet, stderr=stderr, highlight=False, markup=False, emoji=False)
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
        self._bar = self._progress.add_task("waiting for clients", total=None)
        self._seen = -1

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._progress.stop()

    def hush(self) -> None:
        """Show nothing from now on."""
        self._console.quiet = True

    def chosen(self, settings: Settings) -> None:
        """Say what runs, and who chose it."""
        source = settings.sources.get("backend", "default")
        self._console.print(
            f"backend {settings.backend} ({source}), "
            f"{'at most ' if settings.auto else ''}{settings.max_workers} workers, "
            f"{settings.threads_per_worker} thread(s) each"
        )

    def progress(self, current: Round, done: int, rounds: int | None = None) -> None:
        """Take note of one more answer, or of the end of a round; and of how many rounds there will be."""
        self._rounds = rounds or self._rounds
        if current.seconds:
            self._line(current)
            return
        total = len(current.clients) * self._rounds if self._rounds else None
        before = len(current.clients) * (current.server_round - 1)
        self._progress.update(
            self._bar,
            description=self._name(current),
            total=total,
            completed=before + done,
        )

    def _name(self, current: Round) -> str:
        return f"round {current.server_round}" + (f"/{self._rounds}" if self._rounds else "")

    def _line(self, current: Round) -> None:
        if current.server_round <= self._seen:
            return
        self._seen = current.server_round
        self._console.print(
            f"{self._name(current)}  loss {_number(current.loss)}  "
            f"accuracy {_number(_accuracy(current.metrics))}  {current.seconds:.1f} s"
        )
        for failure in current.failures:
            self._console.print(f"  client {failure['client']}: {failure['reason']}", style="red")

    def table(self, rounds: list[Round], stats: Stats, tasks: list[TaskRecord], timeline: Timeline) -> None:
        """Print the rounds and what they cost."""
        table = Table("round", "loss", "accuracy", "clients", "failed", "seconds")
        for column in table.columns:
            column.justify = "right"
        evaluated = any(current.client_metrics for current in rounds)
        if evaluated:
            table.add_column("clients' accuracy", justify="right")
        for current in rounds:
            row = [
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
            f"{len(tasks)} tasks in {len(workers)} processes, peak {format_size(max(peaks, default=None))}; "
            f"{stats.worker_deaths} died, {stats.timeouts} timed out, {stats.retries} run again"
        )
        self._console.print(
            f"all processes together: peak {format_size(timeline.host.peak)} of the host's memory"
        )
        for device in timeline.watched:
            after_round, at_end = (
                timeline.residual_bytes(device.uuid, label) for label in ("round", "shutdown")
            )
            self._console.print(
                f"{device.name}: peak {format_size(timeline.devices[device.uuid].peak)}; left after a round "
                f"{format_size(after_round)}, at the end {format_size(at_end)}"
            )


def _accuracy(metrics: Mapping[str, Any]) -> Any:
    """Return the accuracy, whatever an app has called it."""
    names = sorted((name for name in metrics if "acc" in name.lower()), key=lambda name: name != "accuracy")
    return metrics[names[0]] if names else None


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "not measured"
