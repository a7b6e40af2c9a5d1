"""What the documentation names is there: rooms, files, messages, settings, options, public names."""

import argparse
import ast
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib

import pytest
from pages import DOCS, ROOT, pages, read

import fedexec
from fedexec.settings import options

GENERATORS = DOCS / "generators"


@pytest.fixture(scope="module", autouse=True)
def _generators():
    sys.path.insert(0, str(GENERATORS))
    yield
    sys.path.remove(str(GENERATORS))


# ---------------------------------------------------------------- what is generated


def test_every_setting_stands_in_the_reference_with_all_its_spellings():
    import reference

    text = reference.settings()
    for option in options():
        key = f"executor-{option.name.replace('_', '-')}"
        for spelling in (f"`{option.name}=`", option.variable, key, option.text):
            assert spelling in text
        assert option.name in reference.WITHOUT_FLAG or option.flag in text


def test_keys_of_apps_are_spelt_as_they_are_read():
    pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")
    import reference

    from fedexec.flower.offloading import PREFIX

    assert reference.PREFIX == PREFIX


def test_every_command_stands_in_the_reference_with_every_option():
    import reference

    from fedexec._cli.commands import make_parser

    text = reference.commands()
    (listed,) = (each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    for name, parser in listed.choices.items():
        assert f"## fedexec {name} " in text
        options_ = {option for action in parser._actions for option in action.option_strings}
        assert [option for option in options_ - {"-h", "--help"} if not _stands_in(option, text)] == []


def _stands_in(option, text):
    return re.search(rf"(?:`|, ){re.escape(option)}[ ,`]", text) is not None


def test_every_placeholder_is_one_that_the_site_fills():
    wanted = {found for path in DOCS.rglob("*.md") for found in _placeholders(path)}
    wanted = {found for found in wanted if not found.startswith("file ")}
    text = (GENERATORS / "hooks.py").read_text()
    names = set(re.findall(r'^    "(\w+)": reference\.', text, re.MULTILINE))
    import schemas

    assert wanted == names | {f"schema {name}" for name in schemas.NAMES}


def _placeholders(path):
    return re.findall(r"^<!-- generated: (.+) -->$", path.read_text(), re.MULTILINE)


# ---------------------------------------------------------------- public names

_API = {
    "fedexec.errors": "errors",
    "fedexec.flower": "flower",
    "fedexec.flower.grpc": "grpc",
    "fedexec.devices": "devices",
    "fedexec.memory.timeline": "memory",
    "fedexec.backend": "backend",
}
_OF_FLOWER = ("LoadClientAppError", "LoadServerAppError")


@pytest.mark.parametrize("name", sorted(_API))
def test_every_public_name_has_its_place_in_the_reference(name):
    text = (DOCS / "reference" / "api" / f"{_API[name]}.md").read_text()
    if re.search(rf"^::: {re.escape(name)}\n    options:\n      show_root_heading", text, re.MULTILINE):
        return  # all of the module
    listed = _listed(text)
    elsewhere = {*fedexec.errors.__all__, "Settings", "Capability", "Usage", *_OF_FLOWER}
    assert set(importlib.import_module(name).__all__) - elsewhere <= listed


def test_every_name_of_the_package_itself_stands_somewhere_in_the_reference():
    places = (DOCS / "reference" / "api").glob("*.md")
    listed = {name for path in places for name in _listed(path.read_text())}
    assert set(fedexec.__all__) - set(fedexec.errors.__all__) <= listed


def _listed(text):
    return {each.rpartition(".")[2] for each in re.findall(r"^::: (\S+)$", text, re.MULTILINE)}


# ---------------------------------------------------------------- rooms


def test_the_picture_shows_every_room_and_no_other():
    import rooms

    shown = [room for box in rooms.ROOMS for room in box.room.split()]
    there = {
        path.name
        for path in (ROOT / "fedexec").iterdir()
        if (path / "__init__.py").exists() or (path.suffix == ".py" and not path.name.startswith("__"))
    }
    assert sorted(shown) == sorted(there)
    assert rooms.PICTURE.read_text() == rooms.picture(), "run: python docs/generators/rooms.py"


def test_files_that_the_documentation_names_are_there():
    names: dict[str, str] = {}
    for page in [*DOCS.rglob("*.md"), *ROOT.glob("*.md"), ROOT / "bench" / "README.md"]:
        text = page.read_text()
        found = re.findall(r"`((?:fedexec|fedexec_backends|bench|tests|docs|examples)/[\w/.-]+)`", text)
        found += re.findall(r"github\.com/fedexec/fedexec/(?:blob|tree)/main/([\w/.-]+)", text)
        found += re.findall(r"raw\.githubusercontent\.com/fedexec/fedexec/main/([\w/.-]+)", text)
        names |= dict.fromkeys(found, page.name)
    assert len(names) > 20
    missing = {name: page for name, page in names.items() if not _is_there(name)}
    assert missing == {}


def _is_there(name):
    return any((root / name).exists() for root in (ROOT, ROOT / "backends"))


# ---------------------------------------------------------------- messages


def test_the_messages_of_the_troubleshooting_are_those_of_the_code():
    texts = " ¶ ".join(_texts())
    headings = re.findall(r"^### (.+?) \{ #", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert len(headings) > 40
    parts = [part.strip(" .,:()'`") for heading in headings for part in heading.split("…")]
    lost = [part for part in parts if part and not _is_said(part, texts)]
    assert lost == [], "\n".join(lost)


def _is_said(part, texts):
    """Whether the code says this, in one text or in two that are put together."""
    words = part.split()
    cuts = [(" ".join(words[:cut]), " ".join(words[cut:])) for cut in range(1, len(words))]
    return part in texts or any(first in texts and second in texts for first, second in cuts)


def _texts():
    """Return the texts in the code, in one line each: parts of an f-string each for itself."""
    for root in ("fedexec", "backends"):
        for path in (ROOT / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield " ".join(re.sub(r"%(?:\.\d+f|[sdrg])", " ", node.value).split())


# ---------------------------------------------------------------- packages


def test_the_extras_say_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    (flwr,) = (each for each in extras["flower"] if each.startswith("flwr"))
    assert not any(each.startswith("torch") for each in extras["flower"])
    listed = re.search(r"flwr1\{([\d,]+)\}", (ROOT / "tox.ini").read_text())
    assert listed is not None
    cells = listed[1].split(",")
    assert flwr == f"flwr>=1.{cells[0]},<1.{int(cells[-1]) + 1}"

    from fedexec._cli import doctor

    assert ((1, int(cells[0])), (1, int(cells[-1]) + 1)) == doctor.FLOWER


def test_the_changelog_has_the_version_that_is_released():
    assert f"## [{fedexec.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_is_short_and_its_links_are_absolute():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("https://")] == []


def test_every_snippet_that_is_not_run_says_why():
    for page in pages():
        for snippet in page.of("python", "sh", "bash"):
            assert snippet.is_run or re.fullmatch(r"(not run|parsed): .{10,}", snippet.mark), page.name


# ---------------------------------------------------------------- schemas


def _check(found, schema, definitions, place="$"):
    """Hold JSON to a schema, as far as these schemas go."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        for each in schema["anyOf"]:
            try:
                return _check(found, each, definitions, place)
            except AssertionError:
                continue
        raise AssertionError(f"{place}: {found!r}")
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    assert not kinds or any(_is(found, kind) for kind in kinds), f"{place} is {found!r}, no {kinds}"
    if isinstance(found, dict) and "properties" in schema:
        assert set(schema["required"]) <= set(found), f"{place} lacks {set(schema['required']) - set(found)}"
        unknown = set(found) - set(schema["properties"])
        assert not unknown or schema.get("additionalProperties") is not False, f"{place} has {unknown}"
        for name, each in schema["properties"].items():
            if name in found:
                _check(found[name], each, definitions, f"{place}.{name}")
    elif isinstance(found, dict) and isinstance(schema.get("additionalProperties"), dict):
        for name, value in found.items():
            _check(value, schema["additionalProperties"], definitions, f"{place}.{name}")
    elif isinstance(found, list) and "items" in schema:
        for index, value in enumerate(found):
            _check(value, schema["items"], definitions, f"{place}[{index}]")
    return None


def _is(found, kind):
    kinds = {"string": str, "boolean": bool, "null": type(None), "object": dict, "array": list}
    if kind in kinds:
        return isinstance(found, kinds[kind])
    return isinstance(found, int if kind == "integer" else int | float) and not isinstance(found, bool)


def _hold(content, name):
    import schemas

    schema = schemas.schema(name)
    _check(content, schema, schema["$defs"])


def test_the_committed_results_and_their_report_follow_the_schemas():
    from fedexec._report import summarize

    file = ROOT / "bench" / "results" / "cpu.json"
    _hold(json.loads(file.read_text()), "bench")
    _hold(json.loads(json.dumps(summarize([file, file]).as_dict())), "report")


@pytest.mark.flower
@pytest.mark.parametrize("name", [pytest.param("run", marks=pytest.mark.thorough), "simulate"])
def test_what_a_command_writes_follows_the_schema(name, tmp_path):
    pytest.importorskip("rich", reason="needs rich: pip install 'fedexec[flower]'")
    if name == "run":
        pytest.importorskip("torch", reason="needs torch: pip install 'fedexec[demo]'")
        arguments = ["run", "--clients", "1", "--rounds", "1", "--epochs", "1"]
    else:
        (tmp_path / "my_app").mkdir()
        for snippet in read(DOCS / "how-to" / "flower-app.md").snippets:
            if snippet.title is not None:
                (tmp_path / snippet.title).write_text(snippet.text)
        arguments = ["simulate", ".", "--nodes", "2", "--run-config", "num-rounds=1"]
    more = ["--backend", "inline", "--device", "emulated:24GiB", "--quiet", "--json", "run.json"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    subprocess.run(
        [sys.executable, "-m", "fedexec", *arguments, *more],
        check=True, cwd=tmp_path, timeout=240, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    _hold(json.loads((tmp_path / "run.json").read_text()), name)


def test_every_field_of_a_record_is_explained():
    import schemas

    from fedexec.flower.history import Round, TaskRecord
    from fedexec.interface import Usage

    for kind in (Round, TaskRecord, Usage):
        told = schemas.fields_of(kind)
        assert {field.name for field in dataclasses.fields(kind)} == set(told), kind.__name__
