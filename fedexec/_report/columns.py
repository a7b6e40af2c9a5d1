"""The columns of a table of strategies: what is sorted by, what is read, and what each means."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedexec._report import numbers
from fedexec._report.numbers import NOT_MEASURED
from fedexec._report.table import Row

__all__ = ["EMULATED", "Column", "columns"]

EMULATED = "EMULATED"
DEVICE = "device memory"
_WORDS = {"strategy", "reason", "isolation"}


@dataclass(frozen=True, slots=True)
class Column:
    """How a table shows one figure.

    Attributes
    ----------
    key : str
        Attribute of a :class:`Row`, by which rows are sorted.
    title : str
        Heading below that of the group.
    text : callable
        Takes a row and returns what is read.
    explains : str
        What the figure is, in a few words that stand below the heading.
    group : str
        Heading above those of several columns.
    """

    key: str
    title: str
    text: Callable[[Row], str]
    explains: str = ""
    group: str = ""

    @property
    def name(self) -> str:
        """The heading where there is one line for it."""
        return f"{self.group}, {self.title}" if self.group else self.title

    @property
    def is_words(self) -> bool:
        """Whether it stands to the left, as words do; figures stand to the right."""
        return self.key in _WORDS

    def value(self, row: Row) -> Any:
        """Return what is sorted by."""
        return getattr(row, self.key)


def columns(table: Sequence[Row]) -> list[Column]:
    """Return the columns in which something was measured.

    Parameters
    ----------
    table : sequence of Row

    Returns
    -------
    list of Column
        The heading says EMULATED where all figures of devices are; else each figure that is says so itself.
    """
    shown = [each for each in _ALL if any(each.value(row) not in (None, "") for row in table)]
    emulated = {bool(row.emulated) for row in table if row.device_peak is not None}
    if emulated == {True}:
        return [_in_group(each, f"{DEVICE} {EMULATED}") for each in shown]
    if True in emulated:
        return [_marked(each) for each in shown]
    return shown


def _in_group(column: Column, group: str) -> Column:
    return replace(column, group=group) if column.group == DEVICE else column


def _marked(column: Column) -> Column:
    """Have each figure that is emulated say so."""
    if column.group != DEVICE:
        return column
    return replace(
        column, text=lambda row: f"{column.text(row)} {EMULATED}" if row.emulated else column.text(row)
    )


def _size(key: str) -> Callable[[Row], str]:
    return lambda row: numbers.size(getattr(row, key))


def _seconds(key: str) -> Callable[[Row], str]:
    return lambda row: numbers.seconds(getattr(row, key))


def _contained(row: Row) -> str:
    told = NOT_MEASURED if row.contained is None else "yes" if row.contained else "no"
    return f"{told} ({row.survived})" if row.survived else told


def _equal(row: Row) -> str:
    if row.varies:
        return "varies by itself"
    return NOT_MEASURED if row.equal is None else "yes" if row.equal else "NO"


_ALL = (
    Column("strategy", "backend", lambda row: row.strategy, "a ring: not fedexec's"),
    Column("reason", "verdict", lambda row: row.reason, "why, or why not"),
    Column("isolation", "isolation", lambda row: row.isolation, "what a client runs in"),
    Column("clients_per_second", "clients/s", lambda row: numbers.rate(row.clients_per_second)),
    Column("round_median", "median", _seconds("round_median"), group="round"),
    Column("round_p95", "95 %", _seconds("round_p95"), "of the rounds within", "round"),
    Column(
        "overhead", "over in-process", lambda row: numbers.percent(row.overhead, signed=True),
        "against clients in the caller", "round",
    ),
    Column("cold", "cold", _seconds("cold"), "new executor to first result", "start-up"),
    Column("warm", "warm", _seconds("warm"), "one more task, doing nothing", "start-up"),
    Column("imports", "imports", _seconds("imports"), "of each client"),
    Column("device_peak", "peak", _size("device_peak"), "at most held", DEVICE),
    Column("device_residual", "after a round", _size("device_residual"), "at most left", DEVICE),
    Column("device_end", "at exit", _size("device_end"), "left", DEVICE),
    Column("host_peak", "peak", _size("host_peak"), "caller and workers (PSS)", "host memory"),
    Column(
        "contained", "faults contained", _contained, "a worker is killed: other clients that finish"
    ),
    Column("equal", "result equal", _equal, "to the bit, to in-process"),
    Column("n", "rounds", lambda row: str(row.n)),
)  # fmt: skip
