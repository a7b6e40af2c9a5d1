"""What `make gpu` measured with real contexts on a real GPU: read, checked, and laid out as tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedexec._report import numbers
from fedexec._report.checking import AMOUNT, NUMBER, TEXT, Kind, check, mapping_of, optional
from fedexec._report.schema import GPU_KEY, SCHEMA

__all__ = ["GpuRun", "GpuTable"]


@dataclass(frozen=True, slots=True)
class GpuTable:
    """What one test found, a row for each of its parameters.

    Attributes
    ----------
    head : tuple of str
        Names of the columns.
    body : list of tuple of str
        As people read them.
    """

    title: str
    head: tuple[str, ...]
    body: list[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class GpuRun:
    """One file of `make gpu`.

    Attributes
    ----------
    results : dict
        What each test noted: its name, with its parameter in brackets -> name of a figure -> figure. Names
        tell the unit: ``…_bytes``, ``…seconds``, ``…_share``. What was not measured is None.
    """

    label: str
    when: str
    facts: tuple[str, ...]
    results: dict[str, dict[str, Any]]

    @classmethod
    def from_dict(cls, label: str, content: Mapping[str, Any]) -> "GpuRun":
        """Read what `make gpu` wrote.

        Raises
        ------
        ValueError, KeyError, TypeError, AttributeError
            It is of another schema, or damaged.
        """
        if content[GPU_KEY] != SCHEMA:
            raise ValueError(f"it is of schema {content[GPU_KEY]}; this fedexec reads schema {SCHEMA}")
        check(content, {"results": mapping_of(Kind("mapping", lambda value: isinstance(value, dict)))})
        for each in content["devices"]:
            check(each, {"name": TEXT, "total_bytes": optional(AMOUNT)}, "devices")
        names = [f"{each['name']} ({numbers.size(each['total_bytes'])})" for each in content["devices"]]
        versions = (f"Python {content['python']}", f"torch {content['torch']}")
        results = {str(name): dict(figures) for name, figures in content["results"].items()}
        return cls(label, str(content["measured"]), (*names, str(content["machine"]), *versions), results)

    @property
    def tables(self) -> list[GpuTable]:
        """The figures, those of one test together."""
        rows: dict[str, dict[str, dict[str, str]]] = {}
        for name, figures in self.results.items():
            test, _, parameter = name.removesuffix("]").partition("[")
            title = test.removeprefix("test_").replace("_", " ")
            rows.setdefault(title, {})[parameter] = dict(_shown("", figures))
        found = []
        for title, of_parameter in rows.items():
            columns = tuple(dict.fromkeys(name for shown in of_parameter.values() for name in shown))
            body = [
                (parameter, *(shown.get(name, numbers.NOT_MEASURED) for name in columns))
                for parameter, shown in of_parameter.items()
            ]
            found.append(GpuTable(title, ("", *columns), body))
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the file as a report's JSON knows it."""
        return {"file": self.label, "datetime": self.when, "machine": self.facts, "results": self.results}


def _shown(name: str, value: object, unit: str = "") -> list[tuple[str, str]]:
    """Write one figure, or each of a mapping; the unit stands in the innermost name that has one."""
    unit = next((each for each in ("bytes", "seconds", "share") if name.endswith(each)), unit)
    title = name.removesuffix("_bytes").removesuffix("_share").replace("_", " ").strip()
    if isinstance(value, Mapping):
        return [pair for key, each in value.items() for pair in _shown(f"{key} {name}".strip(), each, unit)]
    if isinstance(value, list):
        return [(title, ", ".join(_written(each, unit) for each in value))]
    return [(title, _written(value, unit))]


def _written(value: Any, unit: str) -> str:
    if value is None:
        return numbers.NOT_MEASURED
    if not (AMOUNT if unit == "bytes" else NUMBER).holds(value):
        return str(value)
    if unit == "bytes":
        return numbers.size(value)
    if unit == "seconds":
        return numbers.seconds(value)
    return numbers.percent(value) if unit == "share" else str(value)
