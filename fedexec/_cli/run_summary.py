"""The table and the lines that end a run: what was measured in each round, what failed, and what it cost."""

from collections.abc import Iterator, Mapping

import numpy as np
from rich.table import Table

from fedexec._report.numbers import count
from fedexec._scheduling.futures import Stats
from fedexec._system.control_characters import visible
from fedexec._system.sizes import format_size
from fedexec.flower import Round, TaskRecord
from fedexec.memory.timeline import Timeline

__all__ = ["ending_lines", "failure_line", "measured", "measurements", "rounds_table", "who_failed"]

WRITTEN_OUT = 1e15  # larger numbers are shown with an exponent
MOST_IN_A_LINE, LONGEST_NAME = 8, 40  # measurements, characters
_NUMBERS = (int, float, np.integer, np.floating)
NOT_MEASURED = "-"  # in a column where other rounds were; words would not fit


def rounds_table(rounds: list[Round], width: int) -> tuple[Table, list[str]]:
    """Return a table with a row for each round, and the names of the columns for which there is no space.

    It has no column for what was never measured.

    Parameters
    ----------
    rounds : list of Round
    width : int
        How many characters a line may have.

    Returns
    -------
    tuple of (Table, list of str)
    """
    several = any(current.start > 1 for current in rounds)
    rows = [measurements(current) for current in rounds]
    names = list(dict.fromkeys(name for row in rows for name in row))
    begin = {"round": [str(current.server_round) for current in rounds]}
    if several:
        begin = {"start": [str(current.start) for current in rounds], **begin}
    middle = {name: [_shown(row.get(name)) or NOT_MEASURED for row in rows] for name in names}
    end = {"clients": [str(len(current.clients)) for current in rounds]}
    if any(current.failures for current in rounds):
        end["failed"] = [str(len(current.failures)) for current in rounds]
    end["seconds"] = [f"{current.seconds:.1f}" for current in rounds]
    left = width - 1 - sum(_width(title, cells) for title, cells in {**begin, **end}.items())
    kept: dict[str, list[str]] = {}
    for title, cells in middle.items():
        if _width(title, cells) <= left:
            kept[title] = cells
            left -= _width(title, cells)
    columns = {**begin, **kept, **end}
    table = Table()
    for title in columns:
        table.add_column(title, justify="right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table, [title for title in middle if title not in kept]


def _width(title: str, cells: list[str]) -> int:
    """Return how much of a line a column takes; its title may be broken between words."""
    return max(map(len, [*title.split(), *cells])) + len(" │ ")


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
    numbers = {
        "failed": sum(len(current.failures) for current in rounds),
        "died": stats.worker_deaths,
        "timed out": stats.timeouts,
        "run again": stats.retries,
    }
    yield f"{said}; " + (
        ", ".join(f"{number} {what}" for what, number in numbers.items() if number) or "none failed"
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
    found = [f"{name} {_shown(value)}  " for name, value in measurements(current).items()]
    more = f"and {len(found) - MOST_IN_A_LINE} more  " if len(found) > MOST_IN_A_LINE else ""
    return "".join(found[:MOST_IN_A_LINE]) + more


def measurements(current: Round) -> dict[str, float]:
    """Return each number that was measured in a round, under a name that says who has measured it."""
    found = {
        "loss": current.loss,
        **current.metrics,
        "clients' loss": current.client_loss,
        **{f"clients' {name}": value for name, value in current.client_metrics.items()},
        **{_of_training(name): value for name, value in current.train_metrics.items()},
    }
    return {
        visible(name)[:LONGEST_NAME]: value
        for name, value in found.items()
        if isinstance(value, _NUMBERS) and not isinstance(value, bool)
    }


def _of_training(name: str) -> str:
    return name if name.startswith("train") else f"training {name}"


def _shown(value: object) -> str | None:
    """Return a number as it is shown; None if it is not a number."""
    if not isinstance(value, _NUMBERS):
        return None
    value = value.item() if isinstance(value, np.generic) else value
    assert isinstance(value, int | float)
    try:
        return f"{value:.4f}" if abs(value) < WRITTEN_OUT else f"{value:.4g}"
    except OverflowError:  # clients may answer whole numbers of any size
        return "inf" if value > 0 else "-inf"
