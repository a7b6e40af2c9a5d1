"""`fedexec report`, as a person calls it: what it reads, what it refuses, what it leaves."""

import contextlib
import io
import json
import os
import subprocess
from unittest.mock import patch

import pytest
from planted import benchmark, of_schema, strategy, whole, write

from fedexec._cli import main
from fedexec._report import summarize


def report(*argv, columns=400):
    """Run the command in this process, because a process of its own would take half a second."""
    command = ["report", *map(str, argv)]
    with (
        patch.dict(os.environ, COLUMNS=str(columns)),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        try:
            code = main(command)
        except SystemExit as exc:
            code = int(exc.code or 0)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@pytest.fixture
def good(tmp_path):
    return write(
        tmp_path / "good.json",
        strategy("inline", 2.0, survived=0),
        strategy("standby", 2.1, residual=0, peak=900, warm=0.006),
    )


def test_markdown_has_every_column_in_which_something_was_measured(good):
    done = report(good, "--markdown", "-")
    assert (done.returncode, done.stderr) == (0, "")
    assert "**Use standby: 4.76 clients/s with 2 workers.**" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    head, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[3], lines[5]))
    assert dict(zip(head, cells, strict=True)) == {
        "backend": "standby",
        "verdict": "recommended",
        "isolation": "fresh process",
        "clients/s": "4.76",
        "round, median": "2.10 s",
        "round, 95 %": "2.14 s",
        "round, over in-process": "+5 %",
        "start-up, warm": "6.00 ms",
        "device memory EMULATED, peak": "900 MiB",
        "device memory EMULATED, after a round": "0 B",
        "device memory EMULATED, at exit": "0 B",
        "host memory, peak": "500 MiB",
        "faults contained": "yes (3 of 3)",
        "result equal": "yes",
        "rounds": "9",
    }


def test_the_answers_come_first(good):
    for argv in ((), ("--markdown", "-")):
        lines = report(good, *argv, columns=200).stdout.splitlines()
        head = next(index for index, line in enumerate(lines) if "switch if" in line)
        assert head < 6
        for words in ("cnn", "standby", "4.76 clients/s with 2 workers."):
            assert words in lines[head + 2]


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_a_terminal_is_not_too_narrow_for_it(tmp_path, columns):
    before = whole(tmp_path / "before.json")
    after = write(tmp_path / "after.json", strategy("standby", 1.0), strategy("a-name-as-long-as-this", 9.0))
    done = report(before, after, columns=columns)
    assert max(map(len, done.stdout.splitlines())) <= columns
    text = " ".join(done.stdout.split())  # as if no line were wrapped
    for words in ("> standby", "clients/s", "takes 9.0 times as long as standby", "is the baseline: no"):
        assert words in text
    assert (" fresh process " in text) == (columns > 100), "there is room for more columns"


def test_every_output_is_written_and_says_the_same(good, tmp_path):
    page, text, data = tmp_path / "r.html", tmp_path / "r.md", tmp_path / "r.json"
    done = report(good, "--html", page, "--markdown", text, "--json", data)
    assert (done.returncode, done.stdout) == (0, "")
    found = json.loads(data.read_text())
    (workload,) = found["workloads"]
    row = next(row for row in workload["rows"] if row["strategy"] == "standby")
    assert row["round_median"] == pytest.approx(2.1)
    assert workload["verdict"]["use"] == "standby"
    assert workload["verdict"]["sentence"] in text.read_text()
    assert workload["verdict"]["sentence"] in page.read_text()
    assert "http://" not in page.read_text() and "https://" not in page.read_text()


def test_two_reports_are_compared(good, tmp_path):
    after = write(
        tmp_path / "after.json",
        strategy("inline", 2.0, survived=0),
        strategy("standby", 1.05),
        strategy("pool", 3),
    )
    done = report(good, after)
    assert done.returncode == 0
    assert "faster by 100 %" in done.stdout
    assert "no change inside the noise of 5 %" in done.stdout
    assert "cnn: pool is only in after.json." in done.stdout
    assert "cnn: the verdict is the same, standby." in done.stdout


def test_rounds_of_other_sizes_are_not_compared(good, tmp_path):
    full = write(
        tmp_path / "full.json", strategy("standby", 5.2, clients=25), strategy("pool", 5.2, workload="x")
    )
    done = report(good, full)
    assert "cnn: rounds are not compared: 10 clients a round, 2 at once in good.json, 25 cl" in done.stdout
    assert "slower" not in done.stdout
    back = report(full, good)
    assert "x is only in full.json." in back.stdout


def test_files_of_one_name_are_told_apart(good, tmp_path):
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / good.name).write_text(good.read_text())
    done = report(good, other / good.name)
    assert f"{good} → {other / good.name}" in done.stdout


def test_what_failed_elsewhere_disqualifies_nobody_here(tmp_path):
    failed = {
        "test_round[standby/numpy]": "Hangs: for ever",
        "test_transport[standby/there-and-back]": "Breaks: at once",
    }
    file = write(tmp_path / "some.json", strategy("standby", 2.1), strategy("pool", 9.0), failed=failed)
    done = report(file, "--markdown", "-")
    assert done.returncode == 3
    assert "Use standby" in done.stdout
    numpy = done.stdout.partition("## numpy")[2]
    assert "No verdict: nothing was measured that could be used." in numpy
    assert "failed in round: Hangs: for ever" in numpy


def test_a_file_that_keeps_no_single_rounds_is_read(tmp_path):
    made = strategy("standby", 2.1)
    for part in made:
        part["stats"] |= {"rounds": len(part["stats"].pop("data"))}
    done = report(write(tmp_path / "saved.json", made), "--markdown", "-")
    assert done.returncode == 0
    assert "Use standby: 4.76 clients/s" in done.stdout


def test_a_run_on_a_busy_machine_has_no_verdict_to_compare(good, tmp_path):
    busy = write(tmp_path / "busy.json", strategy("standby", 2.1, load=[9.0, 1.0, 1.0]))
    done = report(good, busy)
    told = "none (the machine was not quiet (load 9 on 2 cores): measure again), was standby."
    assert f"cnn: the verdict is {told}" in done.stdout


def test_another_machine_is_named(good, tmp_path):
    other = write(
        tmp_path / "other.json", [benchmark("round", "standby", [1.0] * 9, "cnn", workload="cnn", cpu="B")]
    )
    done = report(good, other)
    assert done.returncode == 0
    assert "Different machines: good.json is of A CPU (m1), other.json of B (m1)." in done.stdout


def test_a_file_of_many_machines_is_not_whole(tmp_path):
    mixed = write(
        tmp_path / "mixed.json", strategy("inline", 2.0), strategy("standby", 2.1, cpu="A CPU", machine="m2")
    )
    done = report(mixed)
    assert done.returncode == 3
    assert "mixed.json: measured on different machines: A CPU (m1); A CPU (m2)" in done.stdout


def test_an_interrupted_run_is_shown_as_one(tmp_path):
    half = write(
        tmp_path / "half.json",
        strategy("standby", 2.1),
        planned=["test_round[standby/cnn]", "test_round[pool/cnn]"],
    )
    page = tmp_path / "page.html"
    done = report(half, "--html", page)
    assert done.returncode == 3
    says = "half.json: the run was interrupted: 1 of 2 benchmarks are missing"
    assert says in done.stderr
    assert says in page.read_text()


def test_a_backend_that_failed_stands_in_the_table(tmp_path):
    failed = {"test_round[pool/cnn]": "WorkerDiedError: killed"}
    file = write(tmp_path / "failed.json", strategy("standby", 2.1), failed=failed)
    done = report(file)
    assert done.returncode == 3
    assert "  pool " in done.stdout and "failed in round: WorkerDiedError: killed" in done.stdout
    assert "| pool (FAILED)" in report(file, "--markdown", "-").stdout
    assert "failed.json: test_round[pool/cnn] failed: WorkerDiedError: killed" in done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "that is no JSON"),
        ("[1, 2]", "was not written by `fedexec bench` or by pytest-benchmark"),
        (
            '{"benchmarks": [{"name": "a", "stats": {}, "extra_info": {}}]}',
            "what fedexec records is not there",
        ),
        ('{"benchmarks": [7]}', "was it written by `fedexec bench`?"),
        (None, "No such file"),
    ],
)
def test_a_file_of_another_tool_is_named(tmp_path, content, says):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    done = report(path)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"fedexec: error: {path}")
    assert says in line


def test_another_schema_is_refused_and_beside_a_good_file_shown(good, tmp_path):
    later = of_schema(write(tmp_path / "later.json", strategy("standby", 2.1)), 99)
    alone = report(later)
    assert alone.returncode == 1
    assert "it is of schema 99; this fedexec reads schema 1" in alone.stderr
    both = report(good, later)
    assert both.returncode == 3
    assert "! not read: " in both.stdout and "schema 99" in both.stdout


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"memory": "much"}, "not whole: memory"),
        ({"memory": {"host_peak_bytes": 1}}, "not whole: memory"),
        ({"phases": {"compute": 1.0}}, "not whole: phases"),
        ({"faults": {"survived": 3}}, "not whole: faults"),
        ({"clients": None}, "clients: None is no count"),
        ({"clients": 0}, "0 clients"),
        ({"isolation": "a wish"}, "unknown isolation 'a wish'"),
    ],
)
def test_a_record_that_is_not_whole_is_named(tmp_path, damage, says):
    path = write(tmp_path / "damaged.json", [benchmark("round", "standby", [1.0] * 9, "cnn", **damage)])
    done = report(path)
    assert done.returncode == 1
    assert "benchmark test_round[standby/cnn]: " in done.stderr and says in done.stderr


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"fedexec": {"schema": 1, "mode": "quick", "failed": None}}, "failed: None is no mapping of names"),
        ({"benchmarks": [benchmark("round", "standby", [0.0] * 9, "cnn")]}, "its seconds are no seconds"),
        (
            {"benchmarks": [benchmark("round", "standby", [float("nan")], "cnn")]},
            "nan is no number",
        ),
    ],
)
def test_a_file_that_is_damaged_is_named(tmp_path, damage, says):
    done = report(write(tmp_path / "damaged.json", **damage))
    assert done.returncode == 1
    assert says in done.stderr and "Traceback" not in done.stderr


def test_what_only_describes_a_run_may_be_missing(tmp_path):
    file = write(
        tmp_path / "bare.json",
        strategy("standby", 2.1),
        datetime=None,
        machine_info={"cpu": "x"},
        commit_info=[],
    )
    done = report(file)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_output_that_cannot_be_written_is_wrong_usage(good, tmp_path):
    done = report(good, "--html", tmp_path / "missing" / "page.html")
    assert done.returncode == 2
    assert "--html" in done.stderr


def test_a_page_takes_no_markup_from_a_file(tmp_path):
    evil = "<script>alert(1)</script>"
    made = strategy(evil, 2.1, workload=evil)
    from fedexec._report import page

    text = page(summarize([write(tmp_path / "evil.json", made)]))
    assert evil not in text
