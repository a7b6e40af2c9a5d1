"""A command in each phase of its life: Ctrl+C while it is imported and while it ends; nobody reads it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FEDEXEC = [sys.executable, "-m", "fedexec"]


@pytest.mark.parametrize("delay", [0.03, 0.06, 0.1, 0.15, 0.2, 0.3])
@pytest.mark.parametrize("argv", [["probe"], ["bench", "--smoke", "--only", "inline"], ["doctor"]])
def test_ctrl_c_while_it_is_imported_is_quiet(tmp_path, argv, delay):
    with subprocess.Popen(
        [*FEDEXEC, *argv], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        time.sleep(delay)
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=60)
    if "Traceback" not in errors:
        assert started.returncode in (130, -signal.SIGINT, 0)
    else:  # It came while Python itself was starting; none of our modules may be reached then.
        assert not re.search(r"/fedexec/(?!__init__|__main__|_system/)", errors)


HELD = """
import atexit, sys, time
from fedexec._cli import entry
atexit.register(lambda: [time.sleep(0.01) for _ in range(3000)])
atexit.register(print, "ending", flush=True)
sys.argv[1:] = ["backends"]
sys.exit(entry())
"""


def test_ctrl_c_while_it_ends_is_quiet():
    with subprocess.Popen(
        [sys.executable, "-c", HELD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        for line in started.stdout:
            if line == "ending\n":
                break
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=20)
    assert (started.returncode, errors.strip()) == (130, "fedexec: SIGINT")


def test_main_gives_signals_back(capsys):
    from fedexec._cli import main

    before = signal.getsignal(signal.SIGINT)
    main(["backends"])
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------- nobody reads it


def behind_head(*argv, cwd=None, errors=False):
    """Run a command whose reader is gone before it says anything."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        stderr = writing if errors else subprocess.PIPE
        return subprocess.run(
            [*FEDEXEC, *argv], stdout=writing, stderr=stderr, text=True, cwd=cwd, timeout=120
        )
    finally:
        os.close(writing)


@pytest.mark.thorough_but("argv0-", "argv0-1", "argv3-")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "argv",
    [["--help"], ["run", "--help"], ["--version"], ["backends"], ["backends", "--json"], ["doctor"]],
)
def test_behind_head_it_ends_as_other_tools_do(argv, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    done = behind_head(*argv)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("argv", [["--json"], []])
def test_behind_head_probe_ends_so_too(argv):
    done = behind_head("probe", "--task", "os:getpid", "--backend", "inline", *argv)
    assert (done.returncode, done.stderr) == (141, "")


def test_errors_that_nobody_reads_keep_their_exit_code():
    assert behind_head("report", "/no/such/file", errors=True).returncode == 1
    assert behind_head("frobnicate", errors=True).returncode == 2


@pytest.mark.thorough
@pytest.mark.flower
@pytest.mark.parametrize("command", ["run", "run --json -", "simulate"])
def test_behind_head_a_run_ends_and_its_workers_with_it(command):
    argv = [*command.split(), "--clients", "2", "--rounds", "1", "--epochs", "1"]
    if command == "simulate":
        argv = ["simulate", "flower.apps:server", "flower.apps:client", "--nodes", "2"]
    else:
        pytest.importorskip("torch", reason="needs torch: pip install 'fedexec[flower]'")
    began = time.monotonic()
    done = behind_head(*argv, cwd=Path(__file__).parents[1])
    assert done.returncode == 141
    # What a person sees stands there where standard output is for JSON.
    assert "rror" not in done.stderr if "-" in argv else done.stderr == ""
    assert time.monotonic() - began < 60


def test_with_its_output_closed_it_runs():
    command = ["sh", "-c", '"$@" >&-', "sh", *FEDEXEC, "backends"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
