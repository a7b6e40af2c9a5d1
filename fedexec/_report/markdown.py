"""The report as Markdown, which reads in a terminal too."""

from collections.abc import Iterable, Sequence

from fedexec._report import numbers
from fedexec._report.gpu import GpuRun
from fedexec._report.reading import Run
from fedexec._report.summary import Comparison, Section, Summary
from fedexec._report.table import COLUMNS
from fedexec._system.visible import visible

__all__ = ["ON_A_GPU", "gpu_line", "machine_line", "markdown", "overview", "table"]

ON_A_GPU = "With real contexts on a GPU"


def markdown(summary: Summary) -> str:
    """Write the whole report."""
    blocks = ["# Which isolation strategy?"]
    if summary.problems:
        blocks.append("\n".join(f"- **{problem}**" for problem in summary.problems))
    blocks += [_comparison(one) for one in summary.comparisons]
    for section in summary.sections:
        name = section.workload if len(summary.runs) == 1 else f"{section.workload} ({section.run.label})"
        blocks += [f"## {name}", f"**{section.verdict.text}**", f"{section.conditions}:", _rows(section)]
        if section.verdict.notes:
            blocks.append("\n".join(f"- {note}" for note in section.verdict.notes))
    if summary.runs:
        blocks.append("\n".join(machine_line(run) for run in summary.runs))
    for gpu in summary.gpus:
        blocks += [f"## {ON_A_GPU}", gpu_line(gpu)]
        for each in gpu.tables:
            blocks += [f"{each.title}:", table(each.head, each.body)]
    return visible("\n\n".join(blocks), lines=True) + "\n"


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


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Write a table whose columns line up, the first to the left and the others to the right."""
    lines = [list(map(visible, row)) for row in (head, *body)]
    widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(head))]

    def write(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        return f"| {' | '.join([line[0].ljust(widths[0]), *cells[1:]])} |"

    rule = [f"{'-' * widths[0]}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]
    return "\n".join([write(lines[0]), f"| {' | '.join(rule)} |", *map(write, lines[1:])])


def _rows(section: Section) -> str:
    body = []
    for row in section.table:
        cells = [column.text(row) for column in COLUMNS]
        if row.failed is not None:
            cells[0] += " (FAILED)"
        body.append(cells)
    return table([column.title for column in COLUMNS], body)


def _comparison(one: Comparison) -> str:
    blocks = [f"## {one.first.label} → {one.second.label}"]
    if one.changes:
        head = ("strategy", "workload", "first", "second", "ratio", "in words")
        body = [
            (
                change.strategy,
                change.workload,
                numbers.seconds(change.first),
                numbers.seconds(change.second),
                f"{change.ratio:.2f}",
                change.words,
            )
            for change in one.changes
        ]
        blocks.append(table(head, body))
    blocks.append("\n".join(f"- {note}" for note in one.notes))
    return "\n\n".join(blocks)


def overview(summary: Summary) -> str:
    """Write every verdict, and for the first job the few columns that an overview needs."""
    keys = ("strategy", "isolation", "clients_per_second", "warm", "overhead", "device_residual", "contained")
    columns = [column for column in COLUMNS if column.key in keys]
    blocks = [f"**{one.workload}** ({one.conditions}): {one.verdict.text}" for one in summary.sections]
    for section in summary.sections[:1]:
        body = [[column.text(row) for column in columns] for row in section.table if row.failed is None]
        blocks.insert(1, table([column.title for column in columns], body))
    return "\n\n".join(blocks)
