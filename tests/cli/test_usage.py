"""What the command line says to bad input: one line, what is wrong, what to do; and the right exit code."""

import json
import subprocess
import sys

import pytest

from fedexec._cli import main

needs_flower = pytest.mark.flower


def complaint(capsys, *argv):
    """Run a command that must fail; return its exit code and the one line it says."""
    try:
        code = main(list(argv))
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
        (["run", "--backend", "prozess"], 2, "Did you mean 'process'?"),
        (["run", "--backend", "prozess"], 2, "standby, process, pool, loky, inline"),
        (["run", "--max-workers", "0"], 2, "max_workers must be greater than 0, got 0"),
        (["run", "--max-workers", "two"], 2, "max_workers must be a whole number, got 'two'"),
        (["run", "--timeout", "-3"], 2, "timeout must be greater than 0"),
        (["run", "--timeout", "soon"], 2, "timeout must be a number of seconds"),
        (["run", "--memory-limit", "12 parsecs"], 2, "512MiB"),
        (["run", "--start-method", "fork"], 2, "forkserver, spawn"),
        (["run", "--device-memory-limit", "much"], 2, "512MiB"),
        (["run", "--enforce-limits", "perhaps"], 2, "enforce_limits"),
        (["run", "--device", "emulated:1KiB"], 2, "larger than its context"),
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
        (["run", "--save", "/"], 2, "is a directory"),
        (["run", "--certificates", "a.pem", "b.pem", "c.pem"], 2, "a.pem: No such file"),
        (["run", "--client-secret", "/no/such/file"], 2, "/no/such/file: No such file"),
        (["server", "--client-secret", "/dev/null"], 2, "0 bytes are too few for a secret"),
        (["run", "--address", "localhost"], 1, "is not an address. Write it like"),
        (["run", "--address", "127.0.0.1:99999"], 1, "is not an address"),
        (["client", "--clients", "3", "--first", "3"], 2, "are not among 0 to 2"),
        (
            ["client", "--connect-timeout", "0.2", "--address", "127.0.0.1:1"],
            1,
            "No server answers at 127.0.0.1:1",
        ),
        (["simulate", "/no/such/app"], 2, "'/no/such/app' is not a Flower app: Cannot find pyproject.toml"),
        (["simulate", "module:app"], 2, "'module:app' is not a Flower app"),
        (["simulate", "one:app", "two"], 2, "name a Flower app's directory, or server_module:app client_mod"),
        (["simulate", "no_such:app", "no_such:app"], 1, "The ServerApp 'no_such:app' cannot be loaded"),
        (["simulate", "a:b", "c:d", "--run-config", "seven"], 2, "The run config 'seven': write it like"),
        (["simulate", "a:b", "c:d", "--run-config", "executor-size=7"], 2, "is not a setting of an executor"),
        (["simulate", "a:b", "c:d", "--nodes", "0"], 2, "--nodes: must be at least 1"),
        (["frobnicate"], 2, "invalid choice"),
        ([], 2, "COMMAND"),
    ],
)
@needs_flower
def test_bad_input_is_one_line(capsys, argv, code, says):
    got, line = complaint(capsys, *argv)
    assert says in line
    assert got == code


@needs_flower
def test_a_bad_environment_variable_is_named(capsys, monkeypatch):
    monkeypatch.setenv("FEDEXEC_MAX_WORKERS", "many")
    code, line = complaint(capsys, "run")
    assert code == 2
    assert "(FEDEXEC_MAX_WORKERS)" in line


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


@pytest.mark.parametrize("command", ["run", "server", "client", "simulate", "probe", "doctor", "backends"])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert "usage: fedexec" in capsys.readouterr().out
