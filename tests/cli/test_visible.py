"""Text of others steers no terminal: whatever a command prints of it is shown."""

import io
import json
import logging
import os
import subprocess
import sys
import time
from typing import Any

import pytest

from fedexec._cli import main
from fedexec._system import leftovers
from fedexec._system.control_characters import show_in_log, visible

ESCAPE = "\x1b]0;owned\x07\x1b[2J\x9b31m"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m"


def steering(text):
    return [char for char in text if char != "\n" and (ord(char) < 32 or 127 <= ord(char) < 160)]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (ESCAPE, SHOWN),
        ("over\rwritten", "over\\rwritten"),
        ("two\nlines", "two\\nlines"),
        ("turned \u202e round", "turned \\u202e round"),
        ("half \ud800", "half \\ud800"),
        ("päper 実 🤖 [0m", "päper 実 🤖 [0m"),
    ],
)
def test_what_steers_is_shown_and_all_else_is_as_it_was(text, shown):
    assert visible(text) == shown


def test_lines_are_kept_where_there_may_be_several():
    assert visible("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"


def test_a_file_s_name_in_an_error(capsys):
    assert main(["report", f"/no/{ESCAPE}"]) == 1
    assert SHOWN in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", "one", f"--{ESCAPE}"])
    err = capsys.readouterr().err
    assert SHOWN in err and not steering(err)


def test_everything_in_a_report(capsys, tmp_path):
    record = {
        "schema": 1, "group": "round", "strategy": ESCAPE, "isolation": "none", "workload": ESCAPE,
        "cpu": ESCAPE, "machine": ESCAPE, "versions": {ESCAPE: ESCAPE},
    }  # fmt: skip
    both = {ESCAPE: ESCAPE}
    course = {"schema": 1, "mode": ESCAPE, "planned": [ESCAPE], "failed": both, "missing": both}
    one = {"name": ESCAPE, "stats": {"median": 1.0, "iqr": 0.1}, "extra_info": {"fedexec": record}}
    content = {"datetime": ESCAPE, "commit_info": {"id": ESCAPE}, "benchmarks": [one], "fedexec": course}
    (tmp_path / "report.json").write_text(json.dumps(content))
    gpu = {"fedexec-gpu": 1, "measured": ESCAPE, "machine": ESCAPE, "python": ESCAPE, "torch": ESCAPE}
    gpu |= {"devices": [{"name": ESCAPE, "total_bytes": 1}], "results": {ESCAPE: {ESCAPE: ESCAPE}}}
    (tmp_path / "gpu.json").write_text(json.dumps(gpu))
    files = [str(tmp_path / name) for name in ("report.json", "gpu.json", "report.json")]
    assert main(["report", *files]) == 3
    told = capsys.readouterr()
    assert SHOWN in told.out and SHOWN in told.err
    assert not steering(told.out + told.err)


def test_the_name_of_what_others_have_left(capsys, tmp_path, monkeypatch):
    """In a place of this test's own."""
    monkeypatch.setattr(leftovers, "SHARED", tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    planted = tmp_path / f"sem.mp-{ESCAPE}"
    planted.touch()
    os.utime(planted, (time.time() - 3600,) * 2)
    main(["doctor"])
    assert not steering(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["fedexec", "fedexec.flower", "flwr"])
def test_what_is_logged(name):
    main(["backends"])
    written = io.StringIO()
    log, handler = logging.getLogger(name), logging.StreamHandler(written)
    log.addHandler(handler)
    try:
        log.error("a client said %s", ESCAPE)
    finally:
        log.removeHandler(handler)
    assert written.getvalue() == f"a client said {SHOWN}\n"


@pytest.mark.flower
def test_a_log_message_whose_arguments_do_not_fit_is_left_to_logging(capsys):
    logger = logging.Logger("an app's")
    logger.addHandler(logging.StreamHandler(io.StringIO()))
    logger.addFilter(show_in_log)
    logger.info("%d clients", "some")
    assert "--- Logging error ---" in capsys.readouterr().err


def test_the_failure_of_an_app(tmp_path):
    (tmp_path / "hostile.py").write_text(
        "from flwr.serverapp import ServerApp\n"
        "from flwr.clientapp import ClientApp\n"
        "app, client = ServerApp(), ClientApp()\n"
        "@app.main()\n"
        f"def main(grid, context): raise ValueError({ESCAPE!r})\n"
    )
    command = [sys.executable, "-m", "fedexec", "simulate", "hostile:app", "hostile:client"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    assert SHOWN in done.stderr and not steering(done.stderr)


@pytest.mark.flower
def test_a_metric_and_the_reason_of_a_client(capsys):
    from fedexec._cli.display import Display
    from fedexec.flower import Round

    display = Display(1, quiet=False)
    failed = [{"client": 0, "reason": ESCAPE}]
    metrics: dict[str, Any] = {"accuracy": ESCAPE}
    display.progress(Round(1, clients=[0], failures=failed, metrics=metrics, loss=10**400, seconds=1.0), 1)
    out = capsys.readouterr().out
    assert f"client 0: {SHOWN}" in out and "loss inf  1.0 s" in out
    assert not steering(out)
