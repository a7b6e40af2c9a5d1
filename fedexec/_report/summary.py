"""Everything a report says, gathered once: text, page and JSON show the same figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedexec._report import numbers
from fedexec._report.comparison import Change, compare
from fedexec._report.gpu import GpuRun
from fedexec._report.reading import Run, UnreadableError, read
from fedexec._report.schema import SCHEMA
from fedexec._report.table import Row, rows, workloads
from fedexec._report.verdict import Verdict, decide
from fedexec._report.verdict_reasons import with_reasons

__all__ = ["Comparison", "Section", "Summary", "summarize"]


@dataclass(frozen=True, slots=True)
class Section:
    """One run and one workload."""

    run: Run
    workload: str
    table: list[Row]
    verdict: Verdict

    @property
    def conditions(self) -> str:
        """What the figures hold for."""
        row = next((row for row in self.table if row.round_median is not None), None)
        return row.conditions if row else f"rounds: {numbers.NOT_MEASURED}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run after another."""

    first: Run
    second: Run
    changes: list[Change]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Summary:
    """A report.

    Attributes
    ----------
    problems : list of str
        What keeps it from being whole: files not read, runs interrupted, backends that failed.
    """

    runs: list[Run]
    sections: list[Section]
    comparisons: list[Comparison]
    gpus: list[GpuRun]
    problems: list[str]

    def name(self, section: Section) -> str:
        """Return what a section is called: its workload, and its file where there are several."""
        return section.workload if len(self.runs) == 1 else f"{section.workload} ({section.run.label})"

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON knows it."""
        return {
            "schema": SCHEMA,
            "problems": self.problems,
            "runs": [
                {
                    "file": run.label,
                    "datetime": run.when,
                    "commit": run.commit,
                    "machines": run.machines,
                    "mode": run.course.mode if run.course else None,
                }
                for run in self.runs
            ],
            "workloads": [
                {
                    "file": section.run.label,
                    "workload": section.workload,
                    "rows": [row.as_dict() for row in section.table],
                    "verdict": section.verdict.as_dict(),
                }
                for section in self.sections
            ],
            "comparisons": [
                {
                    "first": one.first.label,
                    "second": one.second.label,
                    "changes": [change.as_dict() for change in one.changes],
                    "notes": one.notes,
                }
                for one in self.comparisons
            ],
            "gpus": [gpu.as_dict() for gpu in self.gpus],
        }


def summarize(paths: Sequence[Path]) -> Summary:
    """Read the files, judge each, and compare each with the first.

    Raises
    ------
    UnreadableError
        Not one of them could be read.
    """
    runs: list[Run] = []
    gpus: list[GpuRun] = []
    problems = []
    names = [path.name for path in paths]
    for path in paths:
        try:
            found = read(path, str(path) if names.count(path.name) > 1 else path.name)
            if isinstance(found, GpuRun):
                gpus.append(found)
            else:
                runs.append(found)
        except UnreadableError as exc:
            problems.append(f"not read: {exc}")
            if len(paths) == 1:
                raise
    if not runs and not gpus:
        raise UnreadableError("; ".join(problems))
    problems += [problem for run in runs for problem in run.problems()]
    sections = [_section(run, workload) for run in runs for workload in workloads(run)]
    if runs and not sections:
        problems.append("no round was measured: there is nothing to judge")
    comparisons = [Comparison(runs[0], run, *compare(runs[0], run)) for run in runs[1:]]
    return Summary(runs, sections, comparisons, gpus, problems)


def _section(run: Run, workload: str) -> Section:
    table = rows(run, workload)
    verdict = decide(table, run.course.missing if run.course else None, run.busy(workload))
    return Section(run, workload, with_reasons(table, verdict), verdict)
