"""`fedexec bench` with a task of the user's: what it measures, keeps, goes on from and refuses."""

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from fedexec._bench.plan import plan
from fedexec._bench.result_file import Document
from fedexec._cli.bench import default_file
from fedexec.testing.tasks import poll

ONLY = ("--smoke", "--only", "standby,inline")
OWN = (*ONLY, "--task", "mine:fit", "--arguments", "mine:arguments")


@pytest.mark.thorough
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
    assert "\n  standby " in out
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", "own.json"],
        capture_output=True,
        text=True,
        cwd=place,
    )
    assert compared.returncode == 0, compared.stderr
    assert "test_round[standby/loud:fit]" in compared.stdout


@pytest.mark.thorough
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


@pytest.mark.thorough
def test_a_task_that_fails_is_named_and_the_rest_goes_on(fedexec, place):
    code, _, err = fedexec(
        "bench", *ONLY, "--task", "mine:fails_later", "--arguments", "mine:arguments", "--json", "own.json"
    )
    assert code == 3
    assert "FAILED: ValueError: no such client" in err
    content = json.loads((place / "own.json").read_text())
    assert (
        content["fedexec"]["failed"]["test_round[standby/mine:fails_later]"] == "ValueError: no such client"
    )
    assert any(one["group"] == "faults" for one in content["benchmarks"])


def test_a_task_that_fails_when_it_is_tried_stops_at_once_with_its_traceback(fedexec, place):
    code, out, err = fedexec("bench", "--task", "mine:fails", "--arguments", "mine:arguments")
    assert (code, out) == (1, "")
    assert 'mine.py", line' in err and "in fails" in err
    assert err.splitlines()[-1] == (
        "fedexec: error: --task mine:fails fails, so nothing was measured: ValueError: no such client"
    )
    code, out, err = fedexec("bench", "--task", "mine:dies", "--arguments", "mine:arguments")
    assert (code, out) == (1, "")
    assert "exited with code 7" in err and "Traceback" not in err
    assert list(place.glob("*.json")) == [], "there is nothing to go on from"


@pytest.mark.parametrize(
    ("task", "name"),
    [
        (None, "fedexec-bench.json"),
        ("my_training:fit", "fedexec-bench-my_training-fit.json"),
        ("my.training:Client.fit", "fedexec-bench-my-training-Client-fit.json"),
    ],
)
def test_each_task_has_a_file_of_its_own(task, name):
    assert default_file(task) == name


@pytest.mark.thorough
def test_ctrl_c_loses_no_round_that_was_over(start, fedexec, place):
    """One strategy and a batch of nine rounds: when some are over, the run is interrupted, and goes on."""
    bench = ("bench", "--full", "--only", "inline", "--task", "mine:takes", "--arguments", "mine:arguments")
    file = place / "fedexec-bench-mine-takes.json"
    name = "test_round[inline/mine:takes]"

    def rounds_over():
        if not file.exists():
            return 0
        state = json.loads(file.read_text()).get("fedexec-unfinished", {}).get(name)
        return 0 if state is None else len(state["seconds"])

    process = start(*bench)
    poll(lambda: rounds_over() >= 2, "two rounds are over", seconds=120)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on" in err
    over = rounds_over()
    assert 2 <= over < 9
    kept = json.loads(file.read_text())["fedexec-unfinished"][name]
    code, _, err = fedexec("report", str(file))
    assert code in (1, 3), "nothing is whole yet"
    before = (place / "calls").stat().st_size

    process = start(*bench)
    poll(
        lambda: file.exists() and json.loads(file.read_text())["benchmarks"],
        "the rounds are whole",
        seconds=120,
    )
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert "holds 0 of" in err and "going on" in err
    (benchmark, *_) = json.loads(file.read_text())["benchmarks"]
    assert benchmark["name"] == name
    assert benchmark["stats"]["data"][:over] == kept["seconds"]
    record = benchmark["extra_info"]["fedexec"]
    assert (benchmark["stats"]["rounds"], record["tasks"]) == (9, 90)
    assert record["digest"] not in (None, "varies")
    called = (place / "calls").stat().st_size - before
    assert called < 10 * (9 - over) + 20, "only what was left, the clients alone, and a part that came next"


def test_what_a_file_says_of_rounds_is_not_believed_if_it_cannot_be(tmp_path):
    parts = plan("full", None, ["inline"])
    path = tmp_path / "bench.json"
    document = Document(path, "full", parts, {})
    sound = {"seconds": [0.5], "noted": {}}
    states: list[Any] = [
        sound,
        None,
        3,
        {"seconds": 3, "noted": {}},
        {"seconds": ["x"], "noted": {}},
        {"seconds": [0.5]},
    ]
    for part, state in zip(parts, states, strict=False):
        document.keep(part, state)
    document.write()
    again = Document(path, "full", parts, {})
    assert again.go_on() == 0 and again.is_begun
    assert [again.state(part) for part in parts[: len(states)]] == [sound, None, None, None, None, None]


@pytest.mark.thorough
def test_on_a_terminal_there_is_a_bar(place):
    pytest.importorskip("rich", reason="needs rich: pip install 'fedexec[flower]'")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(place)
        os.execve(
            sys.executable, [sys.executable, "-m", "fedexec", "bench", *OWN], os.environ | {"TERM": "xterm"}
        )
    shown = b""
    with contextlib.suppress(OSError):  # Linux reports the end of the other side so.
        while data := os.read(terminal, 1 << 16):
            shown += data
    _, status = os.waitpid(pid, 0)
    os.close(terminal)
    text = re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode()
    assert os.waitstatus_to_exitcode(status) == 0, text
    assert "rounds of mine:fit" in text and re.search(r"\d+%", text)
    assert "[1/" in text and "Wrote fedexec-bench-mine-fit.json" in text
    assert shown.rpartition(b"\x1b[?25h")[1], "the cursor is shown again"


@pytest.mark.thorough
def test_quiet_says_nothing_where_nothing_fails(fedexec):
    code, out, err = fedexec("bench", *OWN, "-q")
    assert (code, out) == (0, "")
    assert [line for line in err.splitlines() if not line.startswith("This machine is busy")] == []


def test_a_file_of_another_run_is_not_overwritten(fedexec, place):
    (place / "notes.json").write_text('{"dear": "diary"}')
    code, out, err = fedexec("bench", *OWN, "--json", "notes.json")
    assert (code, out) == (2, "")
    assert "name another file with --json, or delete it" in err
    assert (place / "notes.json").read_text() == '{"dear": "diary"}'


@pytest.mark.thorough_but(
    "has no attribute 'missing'", "--json names a file", "--only fork: there are standby, "
)
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
