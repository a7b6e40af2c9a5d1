"""The rounds of a run as other tools read them, while it goes on."""

import argparse
import json
import sys

import numpy as np
import pytest

import fedexec
from fedexec._cli.options import UsageError
from fedexec._cli.round_log import RoundLog
from fedexec.flower import Round, RunRecorder, simulate
from flower import apps, commands

ROUND = Round(
    2,
    loss=0.5,
    metrics={"accuracy": np.float32(0.25), "name": b"\xff"},  # type: ignore[dict-item]
    client_metrics={"auc": 0.75},
    train_metrics={"train_loss": 1.5, "huge": 10**400},
    clients=[0, 3],
    failures=[{"client": 3, "reason": "no data"}],
    seconds=1.0,
)


def asked(**options):
    return argparse.Namespace(**{"tensorboard": None, **options})


def test_each_round_is_a_line_as_soon_as_it_is_over(tmp_path):
    file = tmp_path / "rounds.jsonl"
    file.write_text("of an earlier run\n")
    with RoundLog(asked(), file) as round_log:
        round_log.write(ROUND)
        (line,) = file.read_text().splitlines()
        told = json.loads(line)
        assert told["metrics"] == {"accuracy": 0.25, "name": "b'\\xff'"}
        assert told["failures"] == [{"client": 3, "reason": "no data"}]
        assert told["time"] > 1.7e9
        round_log.write(Round(3, seconds=1.0))
    with RoundLog(asked(), file, goes_on=True) as round_log:
        round_log.write(Round(4, seconds=1.0))
    assert [json.loads(line)["server_round"] for line in file.read_text().splitlines()] == [2, 3, 4]


def test_a_full_disk_ends_the_log_and_not_the_run(caplog, tmp_path):
    with RoundLog(asked(), tmp_path / "rounds.jsonl") as round_log, open("/dev/full", "w") as full:  # noqa: PTH123
        round_log._sinks[0].__self__._file = full  # type: ignore[attr-defined]
        round_log.write(ROUND)
        round_log.write(ROUND)
        full.close = lambda: None  # type: ignore[method-assign]
    (record,) = caplog.records
    assert "round 2 and later ones are not logged: OSError: [Errno 28]" in record.getMessage()


def test_tensorboard_reads_the_rounds_of_each_start(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.util.tensor_util import make_ndarray

    with RoundLog(asked(tensorboard=str(tmp_path / "runs")), None) as round_log:
        ROUND.train_metrics.pop("huge", None)
        round_log.write(ROUND)
        round_log.write(Round(1, loss=0.125, start=2, seconds=1.0))
    events = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / "runs"))
    events.Reload()

    def value(run, tag):
        (event,) = events.Tensors(run, tag)
        return event.step, float(make_ndarray(event.tensor_proto))

    assert value(".", "server/loss") == (2, 0.5)
    assert value(".", "clients/auc") == (2, 0.75)
    assert value(".", "training/train_loss") == (2, 1.5)
    assert value(".", "round/failed") == (2, 1.0)
    assert value("start-2", "server/loss") == (1, 0.125)


def test_without_tensorboard_the_error_has_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(UsageError, match=r"pip install 'fedexec\[tensorboard\]'"):
        RoundLog(asked(tensorboard=str(tmp_path)), None)


def test_a_directory_that_cannot_be_made_is_a_usage_error(tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"--tensorboard .*file/runs: Not a directory"):
        RoundLog(asked(tensorboard=str(tmp_path / "file" / "runs")), None)


def test_the_commands_write_it_and_refuse_where_they_cannot(tmp_path):
    file = tmp_path / "rounds.jsonl"
    app = [
        "simulate",
        "flower.apps:server",
        "flower.apps:client",
        "--nodes",
        "2",
        "--backend",
        "inline",
        "-q",
    ]
    done = commands.run(*app, "-q", "--log", str(file), PYTHONPATH=":".join(sys.path))
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["server_round"] for line in file.read_text().splitlines()][-1] >= 1
    done = commands.run(*app, "--log", str(tmp_path / "no" / "x"))
    assert done.returncode == 2
    assert "--log" in done.stderr
    done = commands.run(*app, "--log", "-")
    assert (done.returncode, "name a file" in done.stderr) == (2, True)


# ---------------------------------------------------------------- in Python


@pytest.fixture(scope="module")
def inline():
    with fedexec.create_executor("inline") as executor:
        yield executor


def test_on_round_gets_each_round_when_it_is_over(inline):
    seen: list[Round] = []
    run = simulate(apps.server, apps.client, num_nodes=2, executor=inline, on_round=seen.append)
    assert seen == run.rounds
    assert all(current.seconds for current in seen)


def test_an_on_round_that_raises_is_named_and_the_run_goes_on(inline, caplog):
    def report(current):
        raise KeyError("project")

    run = simulate(apps.server, apps.client, num_nodes=2, executor=inline, on_round=report)
    told = [record.getMessage() for record in caplog.records if record.name == "fedexec.flower"]
    assert len(told) == len(run.rounds)
    assert told[0].startswith("on_round=")
    assert "report failed in round 1, the run goes on: KeyError: 'project' (" in told[0]
    assert "test_round_log.py, line" in told[0]


def test_a_recorder_and_on_round_together_are_an_error(inline):
    with pytest.raises(TypeError, match="either recorder or on_round"):
        simulate(
            apps.server, apps.client, num_nodes=1, executor=inline, recorder=RunRecorder(), on_round=print
        )
