"""`fedexec bench` with a task of the user's: what it measures, keeps, goes on from and refuses."""

import json
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

from fedexec.testing.tasks import poll

ONLY = ("--smoke", "--only", "standby,inline")
OWN = (*ONLY, "--task", "mine:fit", "--arguments", "mine:arguments")


def test_a_task_of_the_users_is_measured(fedexec, place):
    own = ("--task", "loud:fit", "--arguments", "loud:arguments")
    code, out, err = fedexec("bench", *ONLY, *own, "--json", "own.json")
    assert code == 0, err
    assert "Wrote own.json" in out and "left" in err
    content = json.loads((place / "own.json").read_text())
    records = [one["extra_info"]["fedexec"] for one in content["benchmarks"]]
    rounds = {record["strategy"]: record for record in records if record["group"] == "round"}
    assert rounds.keys() == {"standby", "inline"}
    assert len({record["digest"] for record in rounds.values()}) == 1, "they all computed the same"
    assert {record["group"] for record in records} == {"round", "footprint", "start-up", "scaling", "faults"}
    faults = {record["strategy"]: record["faults"] for record in records if record["group"] == "faults"}
    assert faults["standby"] == {"survived": 3, "others": 3, "usable": True}

    code, out, _ = fedexec("report", "own.json")
    assert code == 0
    assert "standby" in out
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", "own.json"],
        capture_output=True,
        text=True,
        cwd=place,
    )
    assert compared.returncode == 0, compared.stderr
    assert "test_round[standby/loud:fit]" in compared.stdout


def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(start, fedexec, place):
    process = start("bench", *OWN, "--json", "own.json")
    file = place / "own.json"
    deadline = time.monotonic() + 120
    while not file.exists() or len(json.loads(file.read_text())["benchmarks"]) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on" in err
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    done = len(json.loads(file.read_text())["benchmarks"])

    code, _, err = fedexec("report", "own.json")
    assert code == 3
    assert "the run was interrupted" in err

    others = [*OWN[:-1], "mine:others"]
    code, _, err = fedexec("bench", *others, "--json", "own.json")
    assert code == 2
    assert "own.json was measured with other arguments; name another file" in err

    code, _, err = fedexec("bench", *OWN, "--json", "own.json")
    assert code == 0
    planned = len(json.loads(file.read_text())["fedexec"]["planned"])
    assert f"holds {done} of {planned} benchmarks: going on" in err
    assert len(re.findall(r"^\[", err, re.MULTILINE)) == planned - done

    code, _, err = fedexec("bench", *OWN, "--json", "own.json")
    assert code == 0
    assert "delete it to measure anew" in err, "a file that is whole is no new measurement"
    with (place / "mine.py").open("a") as lines:
        lines.write("# changed\n")
    code, _, err = fedexec("bench", *OWN, "--json", "own.json")
    assert code == 2
    assert "own.json was measured with other source; name another file" in err


def test_a_second_ctrl_c_leaves_nobody_either(start, place):
    process = start("bench", *ONLY, "--task", "mine:stubborn", "--json", "own.json")
    poll(lambda: (place / "began").exists(), "a client computes")
    family = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_a_task_that_fails_is_named_and_the_rest_goes_on(fedexec, place):
    code, _, err = fedexec(
        "bench", *ONLY, "--task", "mine:fails", "--arguments", "mine:arguments", "--json", "own.json"
    )
    assert code == 3
    assert "FAILED: ValueError: no such client" in err
    content = json.loads((place / "own.json").read_text())
    assert content["fedexec"]["failed"]["test_round[standby/mine:fails]"] == "ValueError: no such client"
    assert any(one["group"] == "faults" for one in content["benchmarks"])


def test_a_file_of_another_run_is_not_overwritten(fedexec, place):
    (place / "notes.json").write_text('{"dear": "diary"}')
    code, out, err = fedexec("bench", *OWN, "--json", "notes.json")
    assert (code, out) == (2, "")
    assert "name another file with --json, or delete it" in err
    assert (place / "notes.json").read_text() == '{"dear": "diary"}'


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--task", "mine"], "write it like package.module:function"),
        (["--task", "mine:missing"], "has no attribute 'missing'"),
        (["--task", "mine:number"], "that is a int, not a function"),
        (["--task", "mine:fit", "--arguments", "mine:listed"], "it is to return the arguments as a tuple"),
        (["--arguments", "mine:arguments"], "name that too"),
        (["--json", "missing/own.json"], "--json missing/own.json cannot be written"),
        (["--json", "-"], "--json names a file"),
        (["--only", "standby,ray9"], "--only ray9: there are standby, "),
        (["--only", "fork"], "--only fork: there are standby, "),
        (["--only", "ppe-spawn"], "--only ppe-spawn: only with --full"),
    ],
)
def test_wrong_usage_is_one_line(fedexec, argv, says):
    code, out, err = fedexec("bench", *argv)
    assert (code, out) == (2, "")
    (line,) = err.strip().splitlines()
    assert line.startswith("fedexec: error: ")
    assert says in line
