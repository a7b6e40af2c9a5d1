"""`simulate(rehearse=True)`: an app's own cache is filled once, and its workers are born with it."""

import sys

import numpy as np
import pytest

import fedexec
from fedexec.flower import simulate
from flower import apps

APP = """
import os
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
log = Path({log!r})
_data = None


def note(what):
    with log.open("a") as file:
        file.write(f"{{what}}\\n")


note("imported")


def load_data():
    global _data
    if _data is None:
        note("filled")
        _data = np.arange(3.0)
    return _data


def metrics():
    return MetricRecord({{"loss": 0.5, "num-examples": 1}})


@app.train()
def train(message, context):
    added = load_data().sum() + np.random.rand()
    arrays = [array.numpy() + added for array in message.content["arrays"].values()]
    {then}
    return Message(RecordDict({{"arrays": ArrayRecord(arrays), "metrics": metrics()}}), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    load_data()
    return Message(RecordDict({{"metrics": metrics()}}), reply_to=message)
"""


@pytest.fixture
def app(tmp_path, monkeypatch):
    """Return a function that writes an app; it returns what the app has noted so far."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "caching_app", raising=False)
    log = tmp_path / "log"
    log.touch()

    def write(then=""):
        (tmp_path / "caching_app.py").write_text(APP.format(log=str(log), then=then))
        return lambda: log.read_text().split()

    return write


def run(backend="standby", **options):
    with fedexec.create_executor(backend, max_workers=2) as executor:
        return simulate(
            apps.server, "caching_app:app", num_nodes=4, executor=executor, seed=3,
            run_config={"num-rounds": 2, "evaluate": True, "fraction-evaluate": 1.0}, **options,
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["standby", "process", "pool"])
def test_an_apps_cache_is_filled_once_if_it_is_rehearsed(app, backend):
    noted = app()
    plain = run(backend)
    assert noted().count("filled") == len(plain.tasks) == 16
    rehearsed = run(backend, rehearse=True)
    assert noted().count("filled") == 16 + 1
    assert len({task.usage.worker_pid for task in rehearsed.tasks}) == 16
    for one, other in zip(plain.result.arrays.values(), rehearsed.result.arrays.values(), strict=True):
        assert np.array_equal(one.numpy(), other.numpy())


def test_workers_of_an_executor_that_is_given_are_born_with_the_app(app):
    noted = app()
    run()
    assert noted().count("imported") == 1


def test_an_app_that_fails_in_the_rehearsal_fails_as_it_would_without(app, caplog):
    app(then="raise ValueError('no such luck')")
    done = run(rehearse=True)
    assert "no such luck" in caplog.text
    assert len(done.rounds) == 3
