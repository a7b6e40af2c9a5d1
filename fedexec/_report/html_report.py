"""The report as one page: no network, light and dark, phone and paper, mouse, touch and keyboard.

The templates escape whatever is put into them; only plots, and the page's own style and script, are markup.
"""

import base64
import functools
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedexec._report import numbers
from fedexec._report.columns import EMULATED, Column, columns
from fedexec._report.markdown_report import ON_A_GPU, TITLE, gpu_line, machine_line
from fedexec._report.plots import plots
from fedexec._report.reading import Run
from fedexec._report.summary import Comparison, Section, Summary
from fedexec._report.svg import colours
from fedexec._report.table import Row

__all__ = ["page"]

POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src {}; script-src {}"
ALWAYS = {  # on a phone's cards, where the others are shown on demand
    "strategy", "reason", "clients_per_second", "round_median", "overhead", "device_residual", "host_peak",
    "contained",
}  # fmt: skip


_FIGURE = re.compile(r"(\d) (%|[mµ]?s|(?:[KMG]i)?B)(?!\w)")


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of a table.

    Attributes
    ----------
    text : str
        What is read.
    label : str
        What it is, where there are no headings.
    value : str
        What is sorted by; empty where nothing was measured.
    classes : str
    tag : str
        A word that stands below.
    """

    text: str
    label: str = ""
    value: str = ""
    classes: str = "figure"
    tag: str = ""


def page(summary: Summary) -> str:
    """Write the page, the figures as JSON in it."""
    names = {one.record.strategy for run in summary.runs for one in run.measurements}
    class_of = colours(names)
    environment = _environment()
    style, script = (_own(environment, name) for name in ("page.css", "page.js"))
    sections = [_section(summary, section, class_of) for section in summary.sections]
    return environment.get_template("page.html.jinja").render(
        title=TITLE,
        policy=POLICY.format(_source(style), _source(script)),  # nothing else runs, whatever a name holds
        style=style,
        script=script,
        data=summary.as_dict(),
        problems=summary.problems,
        machines=[machine_line(run) for run in summary.runs],
        sections=sections,
        comparisons=[_comparison(one, class_of) for one in summary.comparisons],
        gpus=[{"title": ON_A_GPU, "line": gpu_line(gpu), "tables": gpu.tables} for gpu in summary.gpus],
        versions=[_versions(run) for run in summary.runs],
        class_of=class_of,
    )


@functools.cache
def _environment() -> Environment:
    """Return what compiles the templates, once."""
    made = Environment(
        loader=PackageLoader("fedexec._report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["unbroken"] = _unbroken
    made.policies["json.dumps_kwargs"] = {"sort_keys": False}
    return made


def _unbroken(text: str) -> str:
    """Keep figures and their units on one line."""
    return _FIGURE.sub("\\1\N{NO-BREAK SPACE}\\2", text)


def _own(environment: Environment, name: str) -> Markup:
    """Return one of our own files as it is."""
    assert environment.loader is not None
    source, _, _ = environment.loader.get_source(environment, name)
    return Markup(f"\n{source}")


def _source(text: str) -> str:
    """Return what allows one text inline, by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _section(summary: Summary, section: Section, class_of: Mapping[str, str]) -> dict[str, Any]:
    shown = columns(section.table)
    drawn = plots(section)
    return {
        "id": f"workload-{summary.sections.index(section) + 1}",
        "name": summary.name(section),
        "conditions": section.conditions,
        "verdict": section.verdict,
        "peers": {row.strategy for row in section.table if row.peer},
        "groups": [(name, len(list(same))) for name, same in groupby(column.group for column in shown)],
        "columns": shown,
        "rows": [
            {"class": _class(row, section), "row": row, "cells": [_cell(each, row) for each in shown]}
            for row in section.table
        ],
        "wide": [each for each in drawn if each.is_wide],
        "figures": [each for each in drawn if not each.is_wide],
    }


def _class(row: Row, section: Section) -> str:
    if row.strategy == section.verdict.use:
        return "used"
    return "able" if row.eligible else "out"


def _cell(column: Column, row: Row) -> Cell:
    value, text = column.value(row), column.text(row)
    classes = ["words" if column.is_words else "figure"]
    if column.key not in ALWAYS:
        classes.append("more")
    if text == numbers.NOT_MEASURED:
        classes.append("unknown")
    elif value is False:
        classes.append("no")
    tag = EMULATED if text.endswith(f" {EMULATED}") else ""
    return Cell(
        text.removesuffix(f" {EMULATED}"),
        label=column.name.replace(f" {EMULATED}", ""),  # the heading of the section says so
        value="" if value is None else str(int(value)) if isinstance(value, bool) else str(value),
        classes=" ".join(classes),
        tag=tag,
    )


def _comparison(one: Comparison, class_of: Mapping[str, str]) -> dict[str, Any]:
    rows = [
        {
            "strategy": change.strategy,
            "cells": [
                Cell(change.workload, "workload", change.workload, "words"),
                Cell(numbers.seconds(change.first), "first", str(change.first)),
                Cell(numbers.seconds(change.second), "second", str(change.second)),
                Cell(f"{change.ratio:.2f}", "ratio", str(change.ratio)),
                Cell(change.words, "in words", change.words, "words"),
            ],
        }
        for change in one.changes
    ]
    return {"title": f"{one.first.label} → {one.second.label}", "notes": one.notes, "rows": rows}


def _versions(run: Run) -> str:
    record = next((one.record for one in run.measurements), None)
    if record is None:
        return f"{run.label}: nothing was measured."
    shown = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    load = ", ".join(f"{value:.1f}" for value in record.load or ())
    return f"{run.label}: {shown or 'versions unknown'}. Load before: {load or numbers.NOT_MEASURED}."
