"""Every snippet of the documentation runs, or at least means what it says.

In a page, blocks with a title are files. The Python blocks without one are a script, in their order. The
comment in the line before a block says:

- ``<!-- not run: why -->``, ``<!-- parsed: why -->``: Python is compiled, and shell commands are parsed.
- ``<!-- run -->``: the commands of a shell block are run, too; with what stands behind it as in
  ``<!-- run: --rounds 1 -->``. After ``<!-- run: may fail -->`` their exit code may be 1.

Commands that are not run are read by the parser of the command line all the same.
"""

import argparse
import ast
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
from pages import ROOT, pages

from fedexec._cli.commands import make_parser

SECONDS = 240  # that a script or a command may take on a busy machine
PAGES = {page.name: page for page in pages()}
WITH_PYTHON = [name for name, page in PAGES.items() if page.of("python")]
WITH_SHELL = [name for name, page in PAGES.items() if page.of("sh", "bash")]
EXPENSIVE = {"docs/tutorial.md", "docs/how-to/flower-app.md", "docs/how-to/deployments.md"}  # they train


@pytest.fixture
def place(request, tmp_path):
    """A directory with the files of a page, in which its snippets run."""
    page = PAGES[request.node.callspec.params["name"]]
    for package in page.needs:
        pytest.importorskip(package, reason=f"the page needs {package}: pip install 'fedexec[demo]'")
    for snippet in page.snippets:
        if snippet.title is not None:
            file = tmp_path / snippet.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(_with_a_free_port(snippet.text))
    return tmp_path


_ports: dict[str, str] = {}


def _with_a_free_port(text):
    """A tutorial names a port, which others may use here."""

    def free(found):
        if found[0] not in _ports:
            from fedexec.flower.grpc.address import free_address

            _ports[found[0]] = free_address()
        return _ports[found[0]]

    return re.sub(r"127\.0\.0\.1:\d+", free, text)


def _environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "backends")])
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return kept | quiet | {"PYTHONPATH": path, "FEDEXEC_MAX_WORKERS": "2", "COLUMNS": "80"}


def run(command, place, allowed=(0,)):
    done = subprocess.run(
        command, cwd=place, env=_environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode in allowed, f"{command}\n{done.stdout}{done.stderr}"


# ---------------------------------------------------------------- Python


@pytest.mark.thorough_but(*(name for name in WITH_PYTHON if name not in EXPENSIVE))
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_runs(name, place):
    blocks = PAGES[name].of("python")
    for block in blocks:
        # Cells of a notebook may await.
        compile(block.text, f"{name}:{block.line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    script = [block for block in blocks if block.title is None and block.is_run]
    if script:
        file = place / "the_page.py"
        text = "\n".join(f"# {name}:{block.line}\n{block.text}" for block in script)
        file.write_text(_with_a_free_port(text))
        run([sys.executable, file.name], place)


def test_the_backend_that_is_shown_runs_where_it_is_installed(tmp_path):
    (source,) = (each for each in PAGES["docs/how-to/backend.md"].snippets if each.title == "fedexec_loud.py")
    (project,) = (each for each in PAGES["docs/how-to/backend.md"].snippets if each.title == "pyproject.toml")
    ((name, target),) = tomllib.loads(project.text)["project"]["entry-points"]["fedexec.backends"].items()
    (tmp_path / source.title).write_text(source.text)
    installed = tmp_path / "fedexec_loud-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: fedexec-loud\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text(f"[fedexec.backends]\n{name} = {target}\n")
    (tmp_path / "script.py").write_text(
        f"import fedexec\nwith fedexec.create_executor({name!r}) as executor:\n"
        "    future = executor.submit(divmod, 7, 2)\n"
        "    assert future.result() == (3, 1) and future.usage.worker_pid\n"
        "    assert isinstance(executor.submit(divmod, 1, 0).exception(), ZeroDivisionError)\n"
    )
    run([sys.executable, "script.py"], tmp_path)


# ---------------------------------------------------------------- shell


@pytest.mark.thorough_but(*(name for name in WITH_SHELL if name not in EXPENSIVE))
@pytest.mark.parametrize("name", WITH_SHELL)
def test_shell_commands_are_what_there_is_and_those_that_are_marked_run(name, place):
    for block in PAGES[name].of("sh", "bash"):
        commands = [command for line in _lines(block.text) for command in _commands(line) if command]
        for command in commands:
            check(command)
        kind, _, more = block.mark.partition(":")
        may_fail = more.strip() == "may fail"
        for command in commands if kind == "run" else ():
            extra = [] if may_fail else shlex.split(more)
            run(_as_here([*command, *extra]), place, allowed=(0, 1) if may_fail else (0,))


def _as_here(command):
    head = {"fedexec": [sys.executable, "-m", "fedexec"], "python": [sys.executable]}
    return [*head[command[0]], *command[1:]]


def _lines(text):
    """Return the commands of a block, without comments; a line that ends in a backslash goes on."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def _commands(line):
    """Return the words of each simple command of a line, without what is set for it before."""
    words = shlex.split(line, comments=True)
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "||", "|", ";", "&"):
            commands.append([])
        else:
            commands[-1].append(word.rstrip(";"))
    return [_without_variables(command) for command in commands]


def _without_variables(command):
    while command and re.match(r"[A-Z_]+=", command[0]):
        command = command[1:]
    return command


def check(command):
    """Whether a command is one that exists, called as it can be called."""
    if not command:
        return
    name, *words = [word.rpartition("/")[2] if index == 0 else word for index, word in enumerate(command)]
    if name == "fedexec":
        _check_fedexec(words)
    elif name == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets or "=" in word for word in words), command
    elif name == "pip" or words[:2] == ["-m", "pip"]:
        _check_extras(" ".join(words))
    elif name == "tox":
        assert all(_is_in_tox(each) for each in words[1:2]), command
    elif name == "python" and words[0].endswith(".py") and words[0].startswith(("bench/", "tests/")):
        assert (ROOT / words[0]).is_file(), command


def _check_fedexec(words):
    if "..." in words:
        return
    if words[:1] == ["supernode"] and "--" in words:  # what follows are Flower's
        words = words[: words.index("--")]
    try:
        make_parser().parse_args(words)
    except SystemExit as exc:
        assert exc.code == 0, f"fedexec {shlex.join(words)}"
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    known = _options_of(words[0]) if words and not words[0].startswith("-") else options
    assert options <= known, f"abbreviated or unknown: {options - known}"


def _options_of(command):
    (listed,) = (each for each in make_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return {option for action in listed.choices[command]._actions for option in action.option_strings}


def _check_extras(text):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"(?:fedexec|\.)\[([\w,-]+)\]", text):
        assert set(extras.split(",")) <= set(project["optional-dependencies"]), text


def _is_in_tox(name):
    return re.search(rf"\b{name}\b", (ROOT / "tox.ini").read_text()) is not None


def test_the_parser_is_asked():
    with pytest.raises(AssertionError):
        check(["fedexec", "run", "--no-such-option"])
    with pytest.raises(AssertionError):
        check(["fedexec", "run", "--back", "loky"])
    with pytest.raises(AssertionError):
        check(["pip", "install", "fedexec[everything]"])
    with pytest.raises(AssertionError):
        check(["make", "everything"])
