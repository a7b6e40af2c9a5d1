"""JSON schemas of the files that commands write, from the dataclasses whose ``as_dict`` fills them."""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedexec import Stats
from fedexec._report.comparison import Change
from fedexec._report.schema import KEY, Course, Record
from fedexec._report.table import Row
from fedexec._report.verdict import Verdict
from fedexec._workload.data import DataSpec
from fedexec.flower.history import Round, TaskRecord
from fedexec.settings import Settings

__all__ = ["NAMES", "schema", "tables"]

Schema = dict[str, Any]

_SIMPLE = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
_TEXT, _COUNT, _SECONDS = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_BYTES = {"type": ["integer", "null"], "description": "Bytes; null if it was not measured."}


_READ_BACK = (Record, Course)  # also from files of earlier versions, which lack what came later


# ---------------------------------------------------------------- from dataclasses


class _Definitions:
    """Schemas of dataclasses, each under its name, and of the dataclasses that these use."""

    def __init__(self) -> None:
        self.found: dict[str, Schema] = {}

    def of(self, kind: type, **more: Schema) -> Schema:
        """Return a reference to the schema of a dataclass, with properties that a file adds."""
        name = kind.__name__
        if name not in self.found:
            self.found[name] = {}  # in this place, before what it uses
            hints = typing.get_type_hints(kind)
            told = fields_of(kind)
            properties = {
                field.name: self._of_hint(hints[field.name]) | _description(told.get(field.name, ""))
                for field in dataclasses.fields(kind)
            } | more
            self.found[name] = _object(properties, _summary(kind))
            if kind in _READ_BACK:
                self.found[name]["required"] = [*_without_default(kind), *more]
        return {"$ref": f"#/$defs/{name}"}

    def _of_hint(self, hint: Any) -> Schema:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            return self.of(typing.cast(type, hint))
        if origin in (typing.Union, types.UnionType):
            return _either([self._of_hint(each) for each in arguments])
        if origin in (list, tuple) or (isinstance(origin, type) and issubclass(origin, Sequence)):
            return {"type": "array", "items": self._of_hint(arguments[0])}
        if isinstance(origin, type) and issubclass(origin, Mapping):
            return {"type": "object", "additionalProperties": self._of_hint(arguments[1])}
        if hint in (dict, list):
            return {"type": {dict: "object", list: "array"}[hint]}
        return {"type": _SIMPLE[hint]} if hint in _SIMPLE else {}


def _without_default(kind: type) -> Iterator[str]:
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            yield field.name


def _either(schemas: list[Schema]) -> Schema:
    if all(set(each) == {"type"} for each in schemas):
        return {"type": [each["type"] for each in schemas]}
    return {"anyOf": schemas}


def _object(properties: Mapping[str, Schema], description: str = "") -> Schema:
    return {
        "type": "object",
        **_description(description),
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


def _open_object(**properties: Schema) -> Schema:
    """Describe an object to which other tools add what they like."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _list_of(items: Schema, description: str = "") -> Schema:
    return {"type": "array", **_description(description), "items": items}


def _description(text: str) -> Schema:
    return {"description": text} if text else {}


def _summary(kind: type) -> str:
    return _plain((inspect.getdoc(kind) or "").split("\n\n", 1)[0])


_ENTRY = re.compile(r"^(\w+(?:, \w+)*) : ", re.MULTILINE)


@functools.cache
def fields_of(kind: type) -> dict[str, str]:
    """Return what the "Attributes" of a docstring say of each field."""
    _, _, told = (inspect.getdoc(kind) or "").partition("Attributes\n----------\n")
    told = re.split(r"\n\n\S", told)[0]
    found = {}
    for names, text in _entries(told):
        found |= dict.fromkeys(names.split(", "), text)
    return found


def _entries(told: str) -> Iterator[tuple[str, str]]:
    starts = [*_ENTRY.finditer(told)]
    for start, after in zip(starts, [*starts[1:], None], strict=True):
        entry = told[start.start() : after.start() if after else len(told)]
        yield start[1], _plain(" ".join(entry.split("\n")[1:]))


def _plain(text: str) -> str:
    text = re.sub(r":\w+:`~?(?:[^`<]*<)?([^`>]+)>?`", lambda found: found[1].split(".")[-1], text)
    return " ".join(text.replace("``", "").replace("`", "").split())


# ---------------------------------------------------------------- what is no dataclass


def _series(**more: Schema) -> Schema:
    points = {
        "peak_bytes": _BYTES,
        "seconds": _list_of(_SECONDS, "When, since the timeline began."),
        "bytes": _list_of(_COUNT, "How much, at each of them."),
    }
    return _object(more | points)


def _timeline() -> Schema:
    name_and_size = {"name": _TEXT, "total_bytes": _BYTES, "baseline_bytes": _BYTES}
    mark = {
        "seconds": _SECONDS,
        "label": _TEXT | _description("round, shutdown, or what the caller says."),
        "server_round": {"type": ["integer", "null"]},
        "host_bytes": _BYTES,
        "device_bytes": {"type": "object", "additionalProperties": _BYTES} | _description("By UUID."),
    }
    return _object(
        {
            "began": _SECONDS | _description("Seconds since the epoch."),
            "host": _series(),
            "devices": {"type": "object", "additionalProperties": _series(**name_and_size)},
            "marks": _list_of(_object(mark), "What was held at moments that mean something."),
        },
        "How much memory was held when: of the host by this program, of each device by everybody.",
    )


def _run(definitions: _Definitions) -> Schema:
    data = definitions.of(DataSpec)
    own = dict.fromkeys(("rounds", "epochs", "batch_size"), _COUNT)
    optional = {name: {"type": ["integer", "null"]} for name in ("fit_clients", "available_clients")}
    settings = {
        "data": data, **own, "learning_rate": _SECONDS, **optional, "evaluate_clients": _COUNT,
        "address": {"type": ["string", "null"]},
    }  # fmt: skip
    return _object(
        {
            "fedexec": _TEXT | _description("Its version."),
            "settings": definitions.of(Settings, **settings),
            "resumed_from": {"type": ["integer", "null"]} | _description("The round of a checkpoint."),
            "rounds": _list_of(definitions.of(Round)),
            "tasks": _list_of(definitions.of(TaskRecord)),
            "stats": definitions.of(Stats),
            "memory": _timeline(),
            "weights_sha256": _TEXT | _description("Of the bits of the final weights."),
        },
        "What `fedexec run --json` and `fedexec server --json` write.",
    )


def _simulate(definitions: _Definitions) -> Schema:
    app = _object({"server": _TEXT, "client": _TEXT, "run_config": {"type": "object"}})
    return _object(
        {
            "fedexec": _TEXT | _description("Its version."),
            "app": app,
            "nodes": _COUNT,
            "seed": _COUNT,
            "settings": definitions.of(Settings),
            "rounds": _list_of(definitions.of(Round)),
            "tasks": _list_of(definitions.of(TaskRecord)),
            "stats": definitions.of(Stats),
            "weights_sha256": {"type": ["string", "null"]} | _description("Null if the app left no weights."),
            "memory": _timeline(),
        },
        "What `fedexec simulate --json` writes.",
    )


def _versioned(definitions: _Definitions, kind: type) -> Schema:
    return definitions.of(kind, schema=_COUNT | _description("Changes when older files cannot be read."))


def _bench(definitions: _Definitions) -> Schema:
    stats = _open_object(data=_list_of(_SECONDS, "Seconds a round."))
    extra = _open_object(**{KEY: _versioned(definitions, Record)})
    benchmark = {
        "type": "object",
        "properties": {"name": _TEXT, "group": _TEXT, "stats": stats, "extra_info": extra},
        "required": ["name", "stats", "extra_info"],
    }
    return {
        "type": "object",
        "description": "What `fedexec bench` writes: pytest-benchmark's JSON, and what fedexec adds to it.",
        "properties": {
            "benchmarks": _list_of(benchmark),
            "datetime": _TEXT,
            KEY: _versioned(definitions, Course),
        },
        "required": ["benchmarks", KEY],
    }


def _report(definitions: _Definitions) -> Schema:
    text_or_null = {"type": ["string", "null"]}
    run = {
        "file": _TEXT,
        "datetime": _TEXT,
        "commit": text_or_null,
        "machines": _list_of(_TEXT),
        "mode": text_or_null,
    }
    workload = {
        "file": _TEXT,
        "workload": _TEXT,
        "rows": _list_of(definitions.of(Row)),
        "verdict": definitions.of(
            Verdict,
            sentence=_TEXT | _description("The answer in words."),
            switch=text_or_null | _description("When to use another strategy, as a sentence."),
            notes=_list_of(_TEXT, "What stands in against and remarks, one after the other."),
        ),
    }
    comparison = {
        "first": _TEXT,
        "second": _TEXT,
        "changes": _list_of(definitions.of(Change)),
        "notes": _list_of(_TEXT),
    }
    return _object(
        {
            "schema": _COUNT,
            "problems": _list_of(_TEXT, "What keeps the report from being whole."),
            "runs": _list_of(_object(run)),
            "workloads": _list_of(_object(workload)),
            "comparisons": _list_of(_object(comparison)),
            "gpus": _list_of({"type": "object"}, "What `make gpu` measured."),
        },
        "What `fedexec report --json` writes.",
    )


_WRITERS = {"run": _run, "simulate": _simulate, "bench": _bench, "report": _report}
NAMES = tuple(_WRITERS)


def schema(name: str) -> Schema:
    """Return the JSON schema of one file: ``run``, ``simulate``, ``bench`` or ``report``."""
    definitions = _Definitions()
    content = _WRITERS[name](definitions)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": f"fedexec {name}"}
    return head | content | {"$defs": definitions.found}


# ---------------------------------------------------------------- as Markdown


def tables(name: str) -> str:
    """Write a schema as tables: the file itself, then each kind of object that no file before it has."""
    before = NAMES[: NAMES.index(name)]
    known = {title: file for file in reversed(before) for title in schema(file)["$defs"]}
    whole = schema(name)
    blocks = [_rows(whole)]
    for title, each in whole["$defs"].items():
        if title in known and each == schema(known[title])["$defs"][title]:
            continue
        blocks += [f"#### {title} {{ #{name}-{title} }}", each.get("description", ""), _rows(each)]
    return "\n\n".join(block for block in blocks if block)


def _rows(found: Schema) -> str:
    lines = ["| field | type | |", "| --- | --- | --- |"]
    for name, each in found["properties"].items():
        lines.append(f"| `{name}` | {_kind(each)} | {each.get('description', '').replace('|', '&#124;')} |")
    return "\n".join(lines)


def _kind(found: Schema) -> str:
    if "$ref" in found:
        return f"*{found['$ref'].rpartition('/')[2]}*"
    if "anyOf" in found:
        return " or ".join(map(_kind, found["anyOf"]))
    kind = found.get("type", "any")
    if kind == "array":
        return f"list of {_kind(found['items'])}"
    if kind == "object" and isinstance(found.get("additionalProperties"), dict):
        return f"object of {_kind(found['additionalProperties'])}"
    if kind == "object" and "properties" in found:
        return f"object: {', '.join(f'`{name}`' for name in found['properties'])}"
    return " or ".join(kind) if isinstance(kind, list) else str(kind)
