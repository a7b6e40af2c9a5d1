from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rich", reason="needs rich: pip install 'fedexec[flower]'")
pytest.importorskip("flwr", reason="needs flwr: pip install 'fedexec[flower]'")

from fedexec._cli.display import Display
from fedexec._scheduling.futures import Stats
from fedexec.flower import Round, TaskRecord
from fedexec.settings import resolve
from fedexec.usage import Node


@pytest.mark.parametrize(("workers", "said"), [(3, ", 3 workers"), ("auto", "at most ")])
def test_a_number_that_memory_decides_is_a_bound(capsys, workers, said):
    Display(1, quiet=False).chosen(resolve({"max_workers": workers}))
    assert said in capsys.readouterr().out


def test_the_machines_of_a_cluster_are_named(capsys):
    machines = [Node(str(number), f"host{number}", 4, 8, 1 << 30, (), {}) for number in range(7)]
    Display(1, quiet=False).chosen(resolve({"backend": "ray", "max_workers": 20}), machines=machines)
    out = capsys.readouterr().out
    assert "20 tasks at once on 7 machine(s): host0 (4), host1 (4)" in out
    assert "and 2 more" in out


@pytest.mark.parametrize(
    "text", ["in the [columns]", "no file: [/data/client0]", "[bold]loud[/]", ":smile: [0]"]
)
def test_what_others_wrote_is_shown_as_they_wrote_it(capsys, text):
    display = Display(1, quiet=False)
    display.progress(Round(1, clients=[0], failures=[{"client": 0, "reason": text}], seconds=1.0), 1)
    assert f"client 0: {text}" in capsys.readouterr().out


def test_what_clients_have_evaluated_is_shown_where_it_is_known(capsys):
    display = Display(2, quiet=False)
    found: dict[str, Any] = {
        "metrics": {"auc": np.float32(0.625), "is_best": True, "name": "best"},
        "client_loss": 0.25,
        "client_metrics": {"eval_acc": 0.75},
        "train_metrics": {"train_loss": 1.5, "f1": 2, "per_class": [1.0, 2.0]},
    }
    display.progress(Round(1, loss=0.5, seconds=1.0, **found), 1)
    display.progress(Round(2, loss=0.5, seconds=1.0), 1)
    assert capsys.readouterr().out.splitlines() == [
        "round 1/2  loss 0.5000  auc 0.6250  clients' loss 0.2500  clients' eval_acc 0.7500  "
        "train_loss 1.5000  training f1 2.0000  1.0 s",
        "round 2/2  loss 0.5000  1.0 s",
    ]


def test_where_there_is_no_bar_a_server_writes_how_many_clients_it_waits_for(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fedexec._cli.display.time.monotonic", lambda: now[0])
    display = Display(2, quiet=False)
    for there, seconds in ((0, 1), (0, 1), (3, 1), (4, 5), (4, 5), (9, 5)):
        display.waiting("127.0.0.1:8080", there, 10, written=True)
        now[0] += seconds
    display.waiting("127.0.0.1:8080", 9, 10)
    assert capsys.readouterr().out.splitlines() == [
        "waiting for clients at 127.0.0.1:8080: 0 of 10 are there",
        "waiting for clients at 127.0.0.1:8080: 4 of 10 are there",
        "waiting for clients at 127.0.0.1:8080: 9 of 10 are there",
    ]


class NothingWatched:
    """A timeline that has seen no device, and 1 GiB of the host's memory."""

    host = SimpleNamespace(peak=1 << 30)
    watched = ()


NO_STATS = Stats(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, restarts={})


def ending(capsys, rounds, tasks, stats=NO_STATS):
    """Return the title of each column, and the lines below the table."""
    Display(2, quiet=False).table(rounds, stats, tasks, NothingWatched())  # type: ignore[arg-type]
    lines = capsys.readouterr().out.splitlines()
    titles = [title.strip() for title in lines[1].strip("┃ ").split("┃")]
    return titles, lines[lines.index(next(line for line in lines if line.startswith("└"))) + 1 :]


def task(error=None, usage=None):
    return TaskRecord("train", 0, 1, error, usage)


def test_columns_that_nothing_was_measured_for_are_dropped(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    rounds = [Round(1, clients=[0, 1], seconds=1.0), Round(2, clients=[0, 1], seconds=1.0)]
    assert ending(capsys, rounds, [task()])[0] == ["round", "clients", "seconds"]
    rounds[1].loss, rounds[1].client_loss = 0.5, 0.25
    titles, _ = ending(capsys, rounds, [task()])
    assert titles == ["round", "loss", "clients' loss", "clients", "seconds"]
    rounds[1].metrics, rounds[1].client_metrics = {"accuracy": 0.5}, {"my_acc": 0.25}
    titles, _ = ending(capsys, rounds, [task()])
    assert titles[1:5] == ["loss", "accuracy", "clients' loss", "clients' my_acc"]


@pytest.mark.parametrize("width", [80, 60, 200])
def test_the_table_is_no_wider_than_the_terminal_and_what_is_left_out_is_named(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    metrics: dict[str, Any] = {f"metric_{letter}": 0.125 for letter in "abcdefghijkl"}
    rounds = [Round(1, clients=[0], metrics=metrics, seconds=1.0)]
    Display(2, quiet=False).table(rounds, NO_STATS, [task()], NothingWatched())  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if line[0] in "┏┃└│") <= width
    assert all(out.count(name) == 1 for name in metrics)
    assert ("no space here, but in --json: " in out) is (width < 200)
    assert all("…" not in line for line in out.splitlines())


def test_names_that_a_client_has_sent_are_shown_as_text_and_cut(capsys):
    metrics: dict[str, Any] = {
        "\x1b[31mred": 1.0,
        "long" * 100: 2.0,
        **{f"many{number}": 0.0 for number in range(1000)},
    }
    current = Round(1, clients=[0], client_metrics=metrics, seconds=1.0)
    display = Display(1, quiet=False)
    display.progress(current, 1)
    display.table([current], NO_STATS, [task()], NothingWatched())  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"clients' \x1b[31mred 1.0000" in out
    assert "long" * 20 not in out
    assert len(out) < 5000


def test_a_round_of_which_nothing_is_known_is_not_shown(capsys):
    display = Display(None, quiet=False)
    display.progress(Round(0, seconds=1.0), 0)
    display.table([Round(0, seconds=1.0)], NO_STATS, [task()], NothingWatched())  # type: ignore[arg-type]
    assert capsys.readouterr().out.splitlines()[0] == "1 task; none failed"


def test_reasons_that_the_log_has_told_are_not_repeated(capsys):
    failures = [{"client": number, "reason": "no data"} for number in (30, 4, *range(100, 130))]
    display = Display(1, quiet=False, failures_are_logged=True)
    display.progress(Round(1, clients=[0], failures=failures, seconds=1.0), 1)
    out = capsys.readouterr().out
    assert "  32 clients failed: 4, 30, 100" in out
    assert "and 12 more" in out
    assert "no data" not in out


def test_the_last_lines_count_what_failed_and_tell_of_no_process_where_none_is_known(capsys):
    reason = {"client": 1, "reason": "ValueError: no data"}
    rounds = [Round(1, clients=[0, 1], failures=[reason, {"client": 2, "reason": "other"}], seconds=1.0)]
    _, lines = ending(capsys, rounds, [task("ValueError: no data"), task("other")])
    assert lines == [
        "2 tasks; 2 failed",
        "all processes together: peak 1.0 GiB of the host's memory",
        "all 2 tasks failed; the first: client 1: ValueError: no data",
    ]
    _, lines = ending(capsys, rounds, [task("ValueError: no data"), task("other"), task()])
    assert lines[-1] == "2 of 3 tasks failed; the first: client 1: ValueError: no data"
    _, lines = ending(capsys, [Round(1, seconds=1.0)], [task()])
    assert lines[-1].startswith("all processes together"), "nothing failed"
