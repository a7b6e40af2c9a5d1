"""The report as one page: no network, light and dark, phone and paper, mouse, touch and keyboard."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files

from fedexec._report import numbers
from fedexec._report.gpu import GpuRun
from fedexec._report.markdown import ON_A_GPU, gpu_line, machine_line
from fedexec._report.plots import plots
from fedexec._report.reading import Run
from fedexec._report.summary import Comparison, Section, Summary
from fedexec._report.svg import Figure, colours, tag
from fedexec._report.table import COLUMNS, Column, Row

__all__ = ["page"]

POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src {}; script-src {}"
WORDS = {"strategy", "isolation"}  # columns of words, to the left


def page(summary: Summary) -> str:
    """Write the page, the figures as JSON in it."""
    names = {one.record.strategy for run in summary.runs for one in run.measurements}
    class_of = colours(names)
    blocks = [
        tag("h1", "Which isolation strategy?"),
        *(tag("p", html.escape(machine_line(run)), class_="soft") for run in summary.runs),
        _problems(summary.problems),
        *(_comparison(one, class_of) for one in summary.comparisons),
        *(_section(section, class_of, len(summary.runs) > 1) for section in summary.sections),
        *map(_gpu, summary.gpus),
    ]
    main = tag("main", "".join(blocks)) + _footer(summary.runs)
    data = json.dumps(summary.as_dict()).replace("<", "\\u003c")
    here = files(__package__)
    style, script = (f"\n{(here / name).read_text('utf-8')}" for name in ("page.css", "page.js"))
    policy = POLICY.format(_source(style), _source(script))  # nothing else runs, whatever a file's names hold
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>fedexec: which isolation strategy?</title><style>{style}</style></head>\n<body>{main}"
        '<div id="tip" role="status" hidden></div>'
        f'<script type="application/json" id="report">{data}</script>'
        f"\n<script>{script}</script></body></html>\n"
    )


def _source(text: str) -> str:
    """Return what allows one text inline, by its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _problems(problems: Iterable[str]) -> str:
    items = "".join(tag("li", html.escape(problem)) for problem in problems)
    if not items:
        return ""
    return tag("section", tag("h2", "This is not the whole truth") + tag("ul", items), class_="problems")


def _section(section: Section, class_of: Mapping[str, str], several: bool) -> str:
    verdict = section.verdict
    name = f"{section.workload} ({section.run.label})" if several else section.workload
    answer = tag("p", html.escape(verdict.sentence), class_="answer")
    if verdict.switch:
        answer += tag("p", html.escape(verdict.switch), class_="switch")
    notes = "".join(tag("li", html.escape(note)) for note in verdict.notes)
    return tag(
        "section",
        tag("h2", html.escape(f"Workload: {name}"))
        + tag("div", answer, class_="verdict")
        + (tag("ul", notes, class_="notes") if notes else "")
        + _table(section, class_of)
        + tag("div", "".join(map(_figure, plots(section))), class_="figures"),
    )


def _figure(one: Figure) -> str:
    content = tag("h3", html.escape(one.title)) + one.svg
    if one.caption:
        content += tag("figcaption", html.escape(one.caption), class_="caption")
    return tag("figure", content)


def _table(section: Section, class_of: Mapping[str, str]) -> str:
    title = f"{section.workload}: {section.conditions}"
    heads = []
    for column in COLUMNS:
        button = tag(
            "button", html.escape(column.title), type="button", title=column.explains or column.title
        )
        kind = "words" if column.key in WORDS else "figure"
        heads.append(tag("th", button, scope="col", class_=kind))
    body = []
    for row in section.table:
        cells = [_cell(column, row, class_of) for column in COLUMNS]
        body.append(
            tag("tr", "".join(cells), class_="used" if row.strategy == section.verdict.use else "row")
        )
    table = tag(
        "table",
        tag("caption", html.escape(title))
        + tag("thead", tag("tr", "".join(heads)))
        + tag("tbody", "".join(body)),
        class_="sorts",
    )
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=f"Table of {title}")


def _cell(column: Column, row: Row, class_of: Mapping[str, str]) -> str:
    value, shown = column.value(row), column.text(row)
    written = html.escape(shown)
    if shown == numbers.NOT_MEASURED:
        written = tag("span", written, class_="unknown")
    elif shown.endswith(" EMULATED"):
        written = html.escape(shown.removesuffix(" EMULATED")) + tag("span", "EMULATED", class_="tag")
    elif value is False:
        written = tag("span", written, class_="no")
    data = "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)
    if column.key == "strategy":
        swatch = tag(
            "span", class_=f"swatch{' peer' if row.peer else ''} {class_of.get(row.strategy, 'c13')}"
        )
        failed = tag("span", " failed", class_="no") if row.failed is not None else ""
        return tag("th", swatch + written + failed, scope="row", data_value=data)
    return tag("td", written, data_value=data, class_="words" if column.key in WORDS else "figure")


def _comparison(one: Comparison, class_of: Mapping[str, str]) -> str:
    notes = "".join(tag("li", html.escape(note)) for note in one.notes)
    heads = "".join(
        tag("th", tag("button", title, type="button"), scope="col", class_=kind)
        for title, kind in (
            ("strategy", "words"),
            ("workload", "words"),
            ("first", "figure"),
            ("second", "figure"),
            ("ratio", "figure"),
            ("in words", "words"),
        )
    )
    body = ""
    for change in one.changes:
        swatch = tag("span", class_=f"swatch {class_of[change.strategy]}")
        cells = (
            (change.workload, change.workload, "words"),
            (change.first, numbers.seconds(change.first), "figure"),
            (change.second, numbers.seconds(change.second), "figure"),
            (change.ratio, f"{change.ratio:.2f}", "figure"),
            (change.words, change.words, "words"),
        )
        head = tag("th", swatch + html.escape(change.strategy), scope="row", data_value=change.strategy)
        rest = (
            tag("td", html.escape(text), data_value=str(value), class_=kind) for value, text, kind in cells
        )
        body += tag("tr", head + "".join(rest))
    caption = tag("caption", "Median seconds of a round")
    table = tag("table", caption + tag("thead", tag("tr", heads)) + tag("tbody", body), class_="sorts")
    title = f"{one.first.label} → {one.second.label}"
    scroll = tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=f"Table of {title}")
    return tag(
        "section",
        tag("h2", html.escape(title)) + (tag("ul", notes, class_="notes") if notes else "") + scroll,
    )


def _gpu(gpu: GpuRun) -> str:
    blocks = [tag("h2", ON_A_GPU), tag("p", html.escape(gpu_line(gpu)), class_="soft")]
    for each in gpu.tables:
        heads = "".join(tag("th", html.escape(name), scope="col", class_="figure") for name in each.head)
        body = ""
        for name, *figures in each.body:
            cells = "".join(tag("td", html.escape(figure), class_="figure") for figure in figures)
            body += tag("tr", tag("th", html.escape(name), scope="row") + cells)
        caption = tag("caption", html.escape(each.title))
        table = tag("table", caption + tag("thead", tag("tr", heads)) + tag("tbody", body))
        blocks.append(tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=each.title))
    return tag("section", "".join(blocks))


def _footer(runs: Iterable[Run]) -> str:
    terms = "".join(
        tag("dt", html.escape(column.title)) + tag("dd", html.escape(column.explains))
        for column in COLUMNS
        if column.explains
    )
    terms += tag("dt", "verdict") + tag(
        "dd",
        "Of the strategies that give all memory back, contain faults and compute the same, the fastest; what "
        "differs by less than the noise (half the distance between the quartiles of both, at least 5 %) is "
        "as fast.",
    )
    versions = []
    for run in runs:
        record = next((one.record for one in run.measurements), None)
        if record is not None:
            shown = ", ".join(f"{name} {version}" for name, version in record.versions.items())
            load = ", ".join(f"{value:.1f}" for value in record.load or ())
            told = f"{run.label}: {shown or 'versions unknown'}. Load before: {load or numbers.NOT_MEASURED}."
            versions.append(tag("p", html.escape(told)))
    return tag(
        "footer",
        tag("details", tag("summary", "What the words mean") + tag("dl", terms)) + "".join(versions),
    )
