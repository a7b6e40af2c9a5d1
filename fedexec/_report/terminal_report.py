"""The report for a terminal: as wide as it is, with the columns that fit."""

import textwrap
from collections.abc import Iterable, Sequence

from fedexec._report.columns import Column, columns
from fedexec._report.gpu import GpuTable
from fedexec._report.markdown_report import (
    ANSWERS,
    CHANGES,
    ON_A_GPU,
    TITLE,
    answers,
    changes,
    gpu_line,
    machine_line,
)
from fedexec._report.numbers import NOT_MEASURED
from fedexec._report.summary import Comparison, Section, Summary
from fedexec._report.table import Row
from fedexec._system.control_characters import visible

__all__ = ["NARROWEST", "terminal"]

NARROWEST, LONGEST = 40, 24  # characters of a line, and of a cell in a table of strategies
GAP = "  "
USED, OTHER = "> ", "  "
# A column is shown if those before it leave room; the reason of each row stands below it.
BY_IMPORTANCE = (
    "strategy", "clients_per_second", "round_median", "device_residual", "overhead", "host_peak", "contained",
    "warm", "device_peak", "isolation", "cold", "round_p95", "imports", "equal", "n", "device_end",
)  # fmt: skip


def terminal(summary: Summary, width: int) -> str:
    """Write the whole report.

    Parameters
    ----------
    summary : Summary
    width : int
        Characters of a line; taken for NARROWEST if it is less.
    """
    width = max(width, NARROWEST)
    blocks = [TITLE, "\n".join(_wrapped(machine_line(run), width) for run in summary.runs)]
    blocks.append("\n".join(_wrapped(problem, width, "! ") for problem in summary.problems))
    if summary.sections:
        blocks.append(_answers(summary, width))
    blocks += [_comparison(one, width) for one in summary.comparisons]
    blocks += [_section(summary.name(section), section, width) for section in summary.sections]
    for gpu in summary.gpus:
        blocks += [_heading(ON_A_GPU, width), _wrapped(gpu_line(gpu), width)]
        blocks += [_gpu_table(each, width) for each in gpu.tables]
    return visible("\n\n".join(filter(None, blocks)), lines=True) + "\n"


def _answers(summary: Summary, width: int) -> str:
    lines = answers(summary)
    first, second = (min(16, _widest(column)) for column in list(zip(ANSWERS, *lines, strict=True))[:2])
    room = width - first - second - 3 * len(GAP)
    if room < NARROWEST:
        return "\n\n".join(_stacked(ANSWERS, line, width) for line in lines)
    why = room * 11 // 20
    return _grid(ANSWERS, lines, (first, second, why, room - why))


def _stacked(head: Sequence[str], cells: Sequence[str], width: int) -> str:
    """Write what has no room for columns: a line of its own for each cell."""
    pairs = zip(head, cells, strict=True)
    return "\n".join(_wrapped(f"{name}: {cell}" if name else cell, width) for name, cell in pairs)


def _section(name: str, section: Section, width: int) -> str:
    remarks = "\n".join(_wrapped(remark, width) for remark in section.verdict.remarks)
    shown = _that_fit(columns(section.table), section.table, width)
    eligible = [row for row in section.table if row.eligible]
    others = [row for row in section.table if not row.eligible]
    heading = _heading(f"{name}: {section.conditions}", width)
    parts = [f"{heading}\n{remarks}" if remarks else heading, _rows(shown, eligible, section, width)]
    if others:
        parts.append(f"Not considered:\n{_rows(shown, others, section, width, head=not eligible)}")
    return "\n\n".join(filter(None, parts))


def _that_fit(able: Sequence[Column], rows: Sequence[Row], width: int) -> list[Column]:
    """Return as many columns as there is room for, by importance, in their usual order."""
    by_key = {column.key: column for column in able}
    chosen: list[Column] = []
    room = width + len(GAP) - len(OTHER)
    for column in (by_key[key] for key in BY_IMPORTANCE if key in by_key):
        room -= _width(column, rows) + len(GAP)
        if room < 0:
            break
        chosen.append(column)
    return [column for column in able if column in chosen]


def _rows(
    shown: Sequence[Column], rows: Sequence[Row], section: Section, width: int, *, head: bool = True
) -> str:
    widths = [_width(column, section.table) for column in shown]
    right = [index for index, column in enumerate(shown) if not column.is_words]
    lines = _head([column.name for column in shown], widths, right, OTHER) if head and rows else []
    for row in rows:
        cells = [visible(column.text(row)) for column in shown]
        lines += _line(cells, widths, right, USED if row.strategy == section.verdict.use else OTHER)
        if row.reason:
            lines.append(_wrapped(row.reason, width, " " * 6))
    return "\n".join(lines)


def _width(column: Column, rows: Iterable[Row]) -> int:
    """Return what a column needs: its longest cell, or word of its heading; longer ones are wrapped."""
    cells = [column.text(row) for row in rows]
    parts = [part for cell in cells for part in (cell.split() if cell == NOT_MEASURED else [cell])]
    return min(LONGEST, _widest([*parts, *column.name.split()]))


def _widest(cells: Iterable[str]) -> int:
    return max(1, *(len(visible(cell)) for cell in cells))


def _comparison(one: Comparison, width: int) -> str:
    blocks = [_heading(f"{one.first.label} → {one.second.label}", width)]
    lines = changes(one)
    if lines:
        widths = [_widest(column) for column in zip(CHANGES, *lines, strict=True)]
        room = width - sum(widths[:-1]) - len(GAP) * (len(widths) - 1)
        if room < NARROWEST // 2:
            blocks += [_stacked(CHANGES, line, width) for line in lines]
        else:
            blocks.append(_grid(CHANGES, lines, (*widths[:-1], room), right=(2, 3, 4)))
    blocks.append("\n".join(_wrapped(note, width) for note in one.notes))
    return "\n\n".join(blocks)


def _gpu_table(each: GpuTable, width: int) -> str:
    widths = [_widest(column) for column in zip(each.head, *each.body, strict=True)]
    if sum(widths) + len(GAP) * (len(widths) - 1) > width:
        stacked = [_stacked(each.head, line, width) for line in each.body]
        return "\n\n".join([f"{each.title}:", *stacked])
    return f"{each.title}:\n{_grid(each.head, each.body, widths, right=range(1, len(widths)))}"


def _grid(
    head: Sequence[str], body: Iterable[Sequence[str]], widths: Sequence[int], right: Iterable[int] = ()
) -> str:
    """Write a table whose cells are wrapped to the widths of their columns."""
    right = tuple(right)
    lines = _head(head, widths, right)
    for cells in body:
        lines += _line(cells, widths, right)
    return "\n".join(lines)


def _head(head: Sequence[str], widths: Sequence[int], right: Sequence[int], before: str = "") -> list[str]:
    rule = GAP.join("-" * width for width in widths)
    return [*_line(head, widths, right, before, at_bottom=True), f"{' ' * len(before)}{rule}"]


def _line(
    cells: Sequence[str],
    widths: Sequence[int],
    right: Sequence[int],
    before: str = "",
    *,
    at_bottom: bool = False,
) -> list[str]:
    """Write the cells of one row, each in as many lines as it needs."""
    wrapped = [textwrap.wrap(visible(cell), width) for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, wrapped))
    lines = []
    for number in range(height):
        parts = []
        for index, (texts, width) in enumerate(zip(wrapped, widths, strict=True)):
            at = number - (height - len(texts)) if at_bottom else number
            text = texts[at] if 0 <= at < len(texts) else ""
            parts.append(text.rjust(width) if index in right else text.ljust(width))
        margin = before if number == 0 else " " * len(before)
        lines.append(f"{margin}{GAP.join(parts)}".rstrip())
    return lines


def _heading(text: str, width: int) -> str:
    wrapped = _wrapped(text, width)
    return f"{wrapped}\n{'=' * max(map(len, wrapped.splitlines()))}"


def _wrapped(text: str, width: int, before: str = "") -> str:
    return textwrap.fill(visible(text), width, initial_indent=before, subsequent_indent=" " * len(before))
