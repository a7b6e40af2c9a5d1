"""What the command line says to bad input: one line, what is wrong, what to do; and the right exit code."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

import fedexec
from fedexec._cli import main
from fedexec._cli.commands import make_parser

needs_flower = pytest.mark.flower


def complaint(capsys, *argv):
    """Run a command that must fail; return its exit code and the one line it says."""
    try:
        code: str | int | None = main(list(argv))
    except SystemExit as exc:
        code = exc.code
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("fedexec")
    return code, lines[0]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["run", "--backend", "prozess"], 2, "no backend 'prozess' (--backend). Did you mean 'process'?"),
        (["run", "--backend", "prozess"], 2, "standby, process, pool, loky, inline"),
        (["run", "--max-workers", "0"], 2, "max_workers must be greater than 0, got 0 (--max-workers)"),
        (["run", "--max-workers", "two"], 2, "max_workers must be a whole number, got 'two'"),
        (["run", "--timeout", "-3"], 2, "timeout must be greater than 0"),
        (["run", "--timeout", "soon"], 2, "timeout must be a number of seconds"),
        (["run", "--memory-limit", "12 parsecs"], 2, "512MiB"),
        (["run", "--start-method", "fork"], 2, "forkserver, spawn"),
        (["run", "--device-memory-limit", "much"], 2, "512MiB"),
        (["run", "--enforce-limits", "perhaps"], 2, "enforce_limits"),
        (["run", "--device", "emulated:1KiB"], 2, "smaller than 1 TiB (--device)"),
        (["run", "--device", "7"], 1, "--device='7' "),
        (["run", "--retries", "-1"], 2, "retries must not be negative"),
        (["run", "--log-level", "loud"], 2, "DEBUG"),
        (
            ["run", "--clients", "2", "--available-clients", "3"],
            2,
            "--available-clients 3 are more than --clients 2",
        ),
        (["run", "--clients", "2", "--fit-clients", "3"], 2, "--fit-clients 3 are more than --clients 2"),
        (["run", "--clients", "0"], 2, "--clients: must be at least 1"),
        (["run", "--rounds", "1.5"], 2, "--rounds: invalid int value"),
        (["run", "--learning-rate", "0"], 2, "--learning-rate: must be greater than 0"),
        (["run", "--partition", "fair"], 2, "iid"),
        (["run", "--json", "/no/such/directory/out.json"], 2, "cannot be written"),
        (["run", "--json", ""], 2, "--json needs the name of a file"),
        (["run", "--save", "/"], 2, "is a directory"),
        (["run", "--save", "-"], 2, "--save - is the standard output, but what it writes is no text"),
        (["run", "--standby", "99999999"], 2, "standby=99999999 needs up to"),
        (["run", "--certificates", "a.pem", "b.pem", "c.pem"], 2, "--certificates a.pem: No such file"),
        (["run", "--client-secret", "/no/such/file"], 2, "--client-secret /no/such/file: No such file"),
        (["server", "--client-secret", "/dev/null"], 2, "0 bytes are too few for a secret"),
        (["run", "--address", "localhost"], 2, "--address: 'localhost' is not an address. Write it like"),
        (["client", "--address", "127.0.0.1:99999"], 2, "is not an address"),
        (["client", "--clients", "3", "--first", "3"], 2, "are not among 0 to 2"),
        (
            ["client", "--connect-timeout", "0.2", "--address", "127.0.0.1:1"],
            1,
            "No server answers at 127.0.0.1:1",
        ),
        (["simulate", "/no/such/app"], 2, "'/no/such/app' is not a Flower app: Cannot find pyproject.toml"),
        (["simulate", "module:app"], 2, "name a Flower app's directory, an installed app (publisher/app)"),
        (
            ["simulate", "one:app", "two"],
            2,
            "name a Flower app's directory, an installed app (publisher/app)",
        ),
        (["simulate", "no_such:app", "no_such:app"], 1, "The ServerApp 'no_such:app' cannot be loaded"),
        (["simulate", "a:b", "c:d", "--run-config", "seven"], 2, "The run config 'seven': write it like"),
        (["simulate", "a:b", "c:d", "--run-config", "executor-size=7"], 2, "is not a setting of an executor"),
        (["simulate", "a:b", "c:d", "--nodes", "0"], 2, "--nodes: must be at least 1"),
        (["simulate", "a:b", "c:d", "--nodes", "12345678901"], 2, "--nodes: must be at most 1,000,000"),
        (["simulate", "a:b", "c:d", "--seed", str(2**63)], 2, "--seed: must be at most 2**63 - 1"),
        (["run", "--seed", str(2**63)], 2, "--seed: must be at most 2**63 - 1"),
        (["run", "--clients", "1000001"], 2, "--clients: must be at most 1,000,000"),
        (["run", "--data", "digts"], 2, "'digts' is none of its values; did you mean digits?"),
        (["run", "--bakend", "inline"], 2, "there is no option --bakend; did you mean --backend?"),
        (["run", "--max", "3"], 2, "there is no option --max; did you mean --max-workers?"),
        (["run", "--client=3"], 2, "there is no option --client; did you mean --clients?"),
        (["run", "now"], 2, "'now' is not an argument of this command (see fedexec run --help)"),
        (["simulat"], 2, "there is no command 'simulat'; did you mean simulate? (see fedexec --help)"),
        (["frobnicate"], 2, "there is no command 'frobnicate': choose from run, server, client"),
        ([], 2, "COMMAND"),
    ],
)
@needs_flower
def test_bad_input_is_one_line(capsys, argv, code, says):
    got, line = complaint(capsys, *argv)
    assert says in line
    assert got == code


@needs_flower
@pytest.mark.parametrize(
    ("variable", "value"),
    [("FEDEXEC_MAX_WORKERS", "many"), ("FEDEXEC_BACKEND", "prozess"), ("FEDEXEC_DEVICE", "emulated:lots")],
)
def test_a_bad_environment_variable_is_named(capsys, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    code, line = complaint(capsys, "run")
    assert code == 2
    assert f"({variable})" in line


@needs_flower
@pytest.mark.parametrize(("key", "value"), [("retries", -1), ("backend", "'prozess'")])
def test_a_bad_key_of_an_app_s_config_is_named(capsys, key, value):
    code, line = complaint(capsys, "simulate", "a:b", "c:d", "--run-config", f"executor-{key}={value}")
    assert code == 2
    assert f"(executor-{key})" in line


@pytest.mark.thorough_but("argv0-1", "argv3-2")
@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["doctor"], 1),
        (["backends"], 0),
        (["probe", "--task", "os:getpid", "--backend", "inline"], 0),
        (["bench", "--only", "nobody"], 2),
        (["report", "/no/such/file"], 1),
        (["client", "--first", "99"], 2),
    ],
)
def test_a_misspelt_variable_is_named_once_by_every_command(argv, code):
    if argv[0] == "client":
        pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")
    environ = os.environ | {"FEDEXEC_MAX_WORKER": "2"}
    command = [sys.executable, "-m", "fedexec", *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environ)
    assert done.returncode == code
    told = done.stdout + done.stderr
    assert told.count("FEDEXEC_MAX_WORKER ") == 1
    assert "did you mean FEDEXEC_MAX_WORKERS?" in told


def test_a_missing_package_is_named_with_the_command_that_installs_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flwr", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command, extra in (("run", "demo"), ("simulate", "flower")):
        code, line = complaint(capsys, command)
        assert code == 1
        assert f"pip install 'fedexec[{extra}]'" in line


def test_backends_lists_every_backend_with_its_promises(capsys):
    assert main(["backends"]) == 0
    text = capsys.readouterr().out
    assert "process" in text
    assert "fresh_process" in text
    assert main(["backends", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["inline"]["promises"] == []
    assert "recycles" in rows["loky"]["promises"]


def test_listing_imports_no_backend_and_nothing_heavy():
    code = (
        "import sys\n"
        "from fedexec._cli import main\n"
        "main(['backends'])\n"
        "heavy = {'fedexec_backends', 'loky', 'flwr', 'torch', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


COMMANDS = ["run", "server", "client", "simulate", "probe", "bench", "report", "doctor", "backends"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_sentence_and_examples_that_fit_a_terminal(capsys, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: fedexec {command}")
    _, about, *_, examples = told.split("\n\n")
    assert about.rstrip().endswith(".")
    assert examples.startswith("examples:\n  fedexec ")
    assert max(map(len, told.splitlines())) <= 80


@pytest.mark.parametrize("command", ["run", "server", "client", "simulate", "probe"])
def test_the_help_says_where_the_executor_s_flags_are_explained(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    _, _, group = " ".join(capsys.readouterr().out.split()).partition("executor: How tasks run.")
    assert group.partition("--backend NAME")[0].rstrip().endswith("/reference/settings/")


def test_the_help_tells_the_commands_and_the_exit_codes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n    {command} " in told
    for code in ("0  ", "1  ", "2  ", "3  ", "130", "141"):
        assert f"\n  {code}  " in told


@pytest.mark.parametrize("flag", ["-V", "--version"])
def test_the_version(capsys, flag):
    with pytest.raises(SystemExit) as caught:
        main([flag])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"fedexec {fedexec.__version__}\n")


EXAMPLES = re.compile(r"^  (fedexec (?:.*\\\n)*.*)$", re.MULTILINE)


def test_every_example_is_a_command_line_that_is_understood():
    parser = make_parser()
    (subparsers,) = (each for each in parser._actions if isinstance(each, argparse._SubParsersAction))
    told = [parser.epilog, *(each.epilog for each in subparsers.choices.values())]
    examples = [example for text in told for example in EXAMPLES.findall(text)]
    assert len(examples) > 20
    for example in examples:
        example = re.split(r"(?<=\w)   *(?=[a-z])", example.replace("\\\n", ""))[0]
        argv = shlex.split(example, comments=True)
        parser.read(argv[1:])
