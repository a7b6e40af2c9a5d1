"""Reports of files that somebody has damaged or made up: each fault has one line that names its place."""

import base64
import contextlib
import copy
import hashlib
import io
import json
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from planted import strategy, whole, write

from fedexec._cli import main
from fedexec._report import UnreadableError, markdown, page, summarize, terminal
from fedexec._report.schema import GPU_KEY, KEY

NUMBERS = (5, -1, 10**400, 1e308, float("inf"), float("nan"))
VALUES: tuple[Any, ...] = (*NUMBERS, True, "x", "\ud800", None, [], [None], {}, {"a": None})

GPU = {
    GPU_KEY: 1, "measured": "2026", "machine": "m", "python": "3", "torch": "2",
    "devices": [{"name": "A GPU", "total_bytes": 1 << 30}],
    "results": {"test_a[b]": {"x_bytes": 1, "y_seconds": 2.0, "z_share": 0.5, "others": [1, {"deep": 2}]}},
}  # fmt: skip


def places(content, place=()):
    """Return where something stands, of lists the first two."""
    if place:
        yield place
    keys = range(len(content[:2])) if isinstance(content, list) else content
    for key in keys if isinstance(content, list | dict) else ():
        yield from places(content[key], (*place, key))


def changed(content, place, value):
    made = copy.deepcopy(content)
    inner = made
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return made


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def outcome(file, content):
    """Report on a file; return the error, having written everything where there is none."""
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    try:
        summary = summarize([file])
    except UnreadableError as exc:
        assert str(exc).startswith(str(file))
        return str(exc)
    page(summary).encode()
    markdown(summary).encode()
    terminal(summary, 80).encode()
    strict(json.dumps(summary.as_dict()))
    return None


@pytest.mark.thorough_but("nan", "None", "[", "'x'")
@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:12])
def test_no_value_anywhere_is_more_than_a_line(file, tmp_path, value):
    content = json.loads(whole(tmp_path / "whole.json").read_text())
    groups: dict[str, Any] = {}
    for one in content["benchmarks"]:
        groups.setdefault(one["group"], one)
    content["benchmarks"] = list(groups.values())[:2]
    for place in places(content):
        outcome(file, changed(content, place, value))
    content["benchmarks"] = list(groups.values())[-2:]
    for place in places(content["benchmarks"], ("benchmarks",)):
        outcome(file, changed(content, place, value))
    for place in places(GPU):
        outcome(file, changed(GPU, place, value))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"load": 5}, "load: 5 is no list"),
        ({"load": ["5"]}, "load: ['5'] is no list"),
        ({"clients": 10**400}, "benchmarks[0].extra_info.fedexec.clients: inf is no number"),
        ({"clients": 10**30}, "clients: 1e+30 is too large"),
        ({"phases": {"start": float("inf")}}, "phases.start: inf is no number"),
        ({"compute_seconds": -1}, "compute_seconds: -1 is no number of seconds"),
        ({"versions": {"torch": 2}}, "versions: {'torch': 2} is no mapping of names"),
        ({"faults": {"survived": "3", "others": 3, "usable": True}}, "faults.survived: '3' is no count"),
        ({"workload": "\ud800"}, "is no text"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(file, damage, says):
    write(file, strategy("standby", 2.1))
    content = json.loads(file.read_text())
    content["benchmarks"][0]["extra_info"][KEY] |= damage
    assert says in outcome(file, content)


def test_rounds_without_end_are_no_rounds(file):
    write(file, strategy("standby", 2.1))
    content = json.loads(file.read_text())
    content["benchmarks"][0]["stats"]["rounds"] = float("inf")
    assert "benchmarks[0].stats.rounds: inf is no number" in outcome(file, content)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [50, 900, 100_000])
def test_what_is_nested_for_its_own_sake_is_not_read(file, opening, depth):
    closing = "]" if opening == "[" else "}"
    assert "nested deeper than 32" in outcome(file, opening * depth + "1" + closing * depth)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/zero and a limit of memory")
def test_a_file_without_end_is_not_read_for_ever():
    command = [sys.executable, "-m", "fedexec", "report", "/dev/zero"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "fedexec: error: /dev/zero: it is larger than 256 MiB\n"


def test_a_hostile_file_beside_a_good_one_spoils_nothing(file, tmp_path):
    good = write(tmp_path / "good.json", strategy("standby", 2.1))
    file.write_text("[" * 100_000)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["report", str(good), str(file)]) == 3
    assert "> standby" in out.getvalue()
    assert err.getvalue().count("\n") == 1


class _Inline(HTMLParser):
    """Gathers what a browser would be asked to run or to apply."""

    texts: dict[str, list[str]]

    def __init__(self):
        super().__init__()
        self.policy, self.inside, self.texts, self.attributes = "", None, {"script": [], "style": []}, set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.attributes |= given.keys()
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag in self.texts and given.get("type") != "application/json":
            self.inside = tag
            self.texts[tag].append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.texts[self.inside][-1] += data


def test_a_page_runs_its_own_script_and_nothing_else(file):
    hostile = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    write(file, strategy("standby", 2.1, workload=hostile), failed={hostile: hostile}, datetime=hostile)
    found = _Inline()
    found.feed(page(summarize([file])))
    allowed = dict(rule.strip().split(" ", 1) for rule in found.policy.split(";"))
    assert allowed["default-src"] == "'none'"
    for tag, (text,) in found.texts.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed[f"{tag}-src"] == f"'sha256-{digest}'"
    assert not {name for name in found.attributes if name.startswith("on") or name == "style"}
