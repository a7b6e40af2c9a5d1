"""The report as Markdown."""

from collections.abc import Iterable, Sequence

from fedexec._report import numbers
from fedexec._report.columns import Column, columns
from fedexec._report.gpu import GpuRun
from fedexec._report.reading import Run
from fedexec._report.summary import Comparison, Summary
from fedexec._report.table import Row
from fedexec._system.control_characters import visible

__all__ = [
    "ANSWERS", "CHANGES", "ON_A_GPU", "TITLE", "answers", "changes", "gpu_line", "machine_line", "markdown",
    "overview", "table",
]  # fmt: skip

TITLE = "Which isolation strategy?"
ANSWERS = ("workload", "use", "why", "switch if")
CHANGES = ("strategy", "workload", "first", "second", "ratio", "in words")
ON_A_GPU = "With real contexts on a GPU"
OVERVIEW = ("strategy", "reason", "clients_per_second", "overhead", "device_residual", "contained")


def markdown(summary: Summary) -> str:
    """Write the whole report."""
    blocks = [f"# {TITLE}"]
    if summary.problems:
        blocks.append("\n".join(f"- **{problem}**" for problem in summary.problems))
    if summary.sections:
        blocks.append(table(ANSWERS, answers(summary), words=range(4)))
    blocks += [_comparison(one) for one in summary.comparisons]
    for section in summary.sections:
        blocks += [f"## {summary.name(section)}", f"**{section.verdict.text}**", f"{section.conditions}:"]
        blocks.append(_rows(section.table, columns(section.table)))
        if section.verdict.remarks:
            blocks.append("\n".join(f"- {remark}" for remark in section.verdict.remarks))
    if summary.runs:
        blocks.append("\n".join(machine_line(run) for run in summary.runs))
    for gpu in summary.gpus:
        blocks += [f"## {ON_A_GPU}", gpu_line(gpu)]
        for each in gpu.tables:
            blocks += [f"{each.title}:", table(each.head, each.body)]
    return visible("\n\n".join(blocks), lines=True) + "\n"


def answers(summary: Summary) -> list[tuple[str, str, str, str]]:
    """Return the table that answers: a line for each workload, below ANSWERS."""
    return [
        (
            summary.name(section),
            section.verdict.use or "no verdict",
            section.verdict.why,
            section.verdict.switch_if,
        )
        for section in summary.sections
    ]


def changes(comparison: Comparison) -> list[tuple[str, ...]]:
    """Return what became of each strategy, below CHANGES."""
    return [
        (
            change.strategy,
            change.workload,
            numbers.seconds(change.first),
            numbers.seconds(change.second),
            f"{change.ratio:.2f}",
            change.words,
        )
        for change in comparison.changes
    ]


def machine_line(run: Run) -> str:
    """Say where and when a run was measured."""
    facts = [run.label, *(run.machines or ["unknown machine"]), run.when[:16].replace("T", " ")]
    if run.course:
        facts.append(run.course.mode)
    if run.commit and run.commit != "unknown":
        facts.append(f"commit {run.commit[:10]}")
    return f"Measured: {', '.join(fact for fact in facts if fact)}."


def gpu_line(gpu: GpuRun) -> str:
    """Say where and when `make gpu` measured."""
    return f"Measured: {', '.join((gpu.label, *gpu.facts, gpu.when[:16].replace('T', ' ')))}."


def table(head: Sequence[str], body: Iterable[Sequence[str]], words: Iterable[int] = (0,)) -> str:
    """Write a table whose columns line up.

    Parameters
    ----------
    head : sequence of str
    body : iterable of sequence of str
        A line of it has as many cells as the head.
    words : iterable of int
        Indices of the columns that stand to the left; figures stand to the right.
    """
    lines = [[visible(cell).replace("|", "\\|") for cell in line] for line in (head, *body)]
    widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(head))]
    left = set(words)

    def write(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if index in left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |"

    rule = ["-" * width if index in left else f"{'-' * (width - 1)}:" for index, width in enumerate(widths)]
    return "\n".join([write(lines[0]), f"| {' | '.join(rule)} |", *map(write, lines[1:])])


def _rows(rows: Iterable[Row], shown: Sequence[Column]) -> str:
    body = []
    for row in rows:
        cells = [column.text(row) for column in shown]
        if row.failed is not None:
            cells[0] += " (FAILED)"
        body.append(cells)
    words = [index for index, column in enumerate(shown) if column.is_words]
    return table([column.name for column in shown], body, words)


def _comparison(one: Comparison) -> str:
    blocks = [f"## {one.first.label} → {one.second.label}"]
    if one.changes:
        blocks.append(table(CHANGES, changes(one), words=(0, 1, 5)))
    blocks.append("\n".join(f"- {note}" for note in one.notes))
    return "\n\n".join(blocks)


def overview(summary: Summary) -> str:
    """Write the answers, and for the first workload the few columns that an overview needs."""
    blocks = [table(ANSWERS, answers(summary), words=range(4))]
    for section in summary.sections[:1]:
        shown = [column for column in columns(section.table) if column.key in OVERVIEW]
        rows = [row for row in section.table if row.failed is None]
        blocks += [f"{section.workload}, {section.conditions}:", _rows(rows, shown)]
    return "\n\n".join(blocks)
