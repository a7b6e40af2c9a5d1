"""The table and the lines that end a run: what was measured in each round, what failed, and what it cost."""

from collections.abc import Callable, Iterator, Mapping

from rich.table import Table

from fedexec._report.numbers import count
from fedexec._scheduling.futures import Stats
from fedexec._system.control_characters import visible
from fedexec._system.sizes import format_size
from fedexec.flower import Round, TaskRecord
from fedexec.memory.timeline import Timeline

__all__ = ["ending_lines", "failure_line", "measured", "rounds_table", "who_failed"]

WRITTEN_OUT = 1e15  # larger numbers are shown with an exponent
NOT_MEASURED = "-"  # in a column where other rounds were; words would not fit


def rounds_table(rounds: list[Round]) -> Table:
    """Return a table with a row for each round, and no column for what was never measured."""
    several = any(current.start > 1 for current in rounds)
    columns: dict[str, Callable[[Round], str | None]] = {
        "start": lambda current: str(current.start) if several else None,
        "round": lambda current: str(current.server_round),
        "loss": lambda current: _shown(current.loss),
        "accuracy": lambda current: _shown(_accuracy(current.metrics)),
        "clients' loss": lambda current: _shown(current.client_loss),
        "clients' accuracy": lambda current: _shown(_accuracy(current.client_metrics)),
        "clients": lambda current: str(len(current.clients)),
        "failed": lambda current: str(len(current.failures)),
        "seconds": lambda current: f"{current.seconds:.1f}",
    }
    cells = {title: [cell(current) for current in rounds] for title, cell in columns.items()}
    kept = {title: column for title, column in cells.items() if any(cell is not None for cell in column)}
    table = Table()
    for title in kept:
        table.add_column(title, justify="right")
    for row in zip(*kept.values(), strict=True):
        table.add_row(*(NOT_MEASURED if cell is None else cell for cell in row))
    return table


def ending_lines(
    rounds: list[Round], stats: Stats, tasks: list[TaskRecord], timeline: Timeline
) -> Iterator[str]:
    """Yield what a run has cost: its tasks, and the memory of the host and of each device."""
    usages = [task.usage for task in tasks if task.usage is not None]
    peaks = [usage.peak_host_bytes for usage in usages if usage.peak_host_bytes is not None]
    workers = {usage.worker_pid for usage in usages}
    said = count(len(tasks), "task")
    if workers:
        said += f" in {count(len(workers), 'process', 'processes')}"
    if peaks:
        said += f", peak {format_size(max(peaks))}"
    failed = sum(len(current.failures) for current in rounds)
    yield (
        f"{said}; {failed} failed, {stats.worker_deaths} died, {stats.timeouts} timed out, "
        f"{stats.retries} run again"
    )
    where = (
        "here, without those on nodes,"
        if any(task.usage and task.usage.node for task in tasks)
        else "together"
    )
    yield f"all processes {where}: peak {format_size(timeline.host.peak)} of the host's memory"
    for device in timeline.watched:
        after_round, at_end = (timeline.residual_bytes(device.uuid, label) for label in ("round", "shutdown"))
        yield (
            f"{visible(device.name)}: peak {format_size(timeline.devices[device.uuid].peak)}; left after a "
            f"round {format_size(after_round)}, at the end {format_size(at_end)}"
        )


def failure_line(rounds: list[Round], tasks: list[TaskRecord]) -> str | None:
    """Return how many tasks failed, and why the first did; None if none failed."""
    failures = [failure for current in rounds for failure in current.failures]
    if not failures:
        return None
    is_all = all(task.error is not None for task in tasks)
    number = f"all {len(tasks)}" if is_all else f"{len(failures)} of {len(tasks)}"
    return visible(f"{number} tasks failed; the first: {who_failed(failures[0])}: {failures[0]['reason']}")


def who_failed(failure: Mapping[str, object]) -> str:
    """Return whose failure one of a round is."""
    return "the server" if failure["client"] is None else f"client {failure['client']}"


def measured(current: Round) -> str:
    """Return what is known of a round's model, with names, as the beginning of a line."""
    values = {
        "loss": current.loss,
        "accuracy": _accuracy(current.metrics),
        "clients' loss": current.client_loss,
        "clients' accuracy": _accuracy(current.client_metrics),
    }
    return "".join(f"{name} {_shown(value)}  " for name, value in values.items() if _shown(value) is not None)


def _accuracy(metrics: Mapping[str, object]) -> object:
    """Return the accuracy, whatever an app has called it; None if there is none."""
    names = sorted((name for name in metrics if "acc" in name.lower()), key=lambda name: name != "accuracy")
    return metrics[names[0]] if names else None


def _shown(value: object) -> str | None:
    """Return a number as it is shown; None if it is not a number."""
    if not isinstance(value, int | float):
        return None
    try:
        return f"{value:.4f}" if abs(value) < WRITTEN_OUT else f"{value:.4g}"
    except OverflowError:  # clients may answer whole numbers of any size
        return "inf" if value > 0 else "-inf"
