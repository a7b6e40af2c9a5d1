"""`simulate(rehearse=True)`: an app's own cache is filled once, and its workers are born with it."""

import functools
import os
import sys
import types
from typing import Any

import numpy as np
import pytest

import fedexec
from fedexec._channel.pickling import dumps
from fedexec._processes.template_successor import rehearse
from fedexec.flower import simulate
from fedexec.flower.simulation import module_caches
from fedexec.flower.simulation.client_app import AppFirst, AppRef
from flower import apps

APP = """
import os
import time
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
note(f"sees:{{os.environ.get('CUDA_VISIBLE_DEVICES')}}")
note(f"draws:{{np.random.rand()}}")


def load_data():
    global _data
    if _data is None:
        note("filled")
        time.sleep({takes})
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

    def write(then="", takes=0):
        (tmp_path / "caching_app.py").write_text(APP.format(log=str(log), then=then, takes=takes))
        return lambda: log.read_text().split()

    return write


def run(backend="standby", *, start_method=None, **options):
    with fedexec.create_executor(backend, max_workers=2, start_method=start_method) as executor:
        return simulate(
            apps.server, "caching_app:app", num_nodes=4, executor=executor, seed=3,
            run_config={"num-rounds": 2, "evaluate": True, "fraction-evaluate": 1.0}, **options,
        )  # fmt: skip


@pytest.mark.thorough_but("standby")
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


def test_an_app_is_loaded_where_it_sees_the_devices(app, monkeypatch):
    """Its line ``DEVICE = "cuda" if torch.cuda.is_available() else "cpu"`` is for its tasks, on a GPU."""
    noted = app()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    call = AppFirst(AppRef("caching_app:app"), functools.partial(os.getenv, "CUDA_VISIBLE_DEVICES"))
    rehearse(dumps(functools.partial(_note_devices, call)))
    assert [each for each in noted() if each.startswith("sees:")] == ["sees:0"]
    assert os.environ.pop("SEEN_IN_THE_CALL") == ""


def _note_devices(call):
    os.environ["SEEN_IN_THE_CALL"] = str(call())


@pytest.mark.thorough
def test_what_an_app_draws_when_it_is_loaded_is_the_same_each_time(app):
    noted = app()
    for backend, first in (("standby", False), ("process", False), ("loky", False), ("standby", True)):
        run(backend, rehearse=first)
    run(start_method="spawn")
    drawn = [each for each in noted() if each.startswith("draws:")]
    assert len(drawn) > 4
    assert len(set(drawn)) == 1


def test_another_message_is_rehearsed_where_the_first_fails(app, caplog):
    noted = app(then="if 'failed' not in log.read_text(): note('failed'); raise ValueError('no such luck')")
    run(rehearse=True)
    assert "workers inherit nothing of the rehearsal of 'train'" in caplog.text
    assert noted().count("filled") == 2


def test_an_app_that_fails_in_the_rehearsal_fails_as_it_would_without(app, caplog):
    app(then="raise ValueError('no such luck')")
    done = run(rehearse=True)
    assert "no such luck" in caplog.text
    assert len(done.rounds) == 3


@pytest.mark.thorough_but("options0-0.4-1")
@pytest.mark.parametrize(
    ("options", "takes", "hints"), [({}, 0.4, 1), ({"rehearse": True}, 0.4, 0), ({}, 0, 0)]
)
def test_one_hint_says_when_a_rehearsal_would_pay(app, caplog, options, takes, hints):
    app(takes=takes)
    run(**options)
    told = [record.message for record in caplog.records if "rehearse=True" in record.message]
    assert len(told) == hints
    if told:
        assert "train message fills caching_app._data again" in told[0]
        assert "takes 0.4 s" in told[0]


class OtherCache:
    def __call__(self):
        return self

    def cache_info(self):
        return {}


class Lazy(types.ModuleType):
    def __getattr__(self, name):
        raise RuntimeError("nobody is to ask")


def test_only_the_users_own_modules_are_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(module_caches, "_modules", [])
    own: Any = types.ModuleType("own")
    own.__file__ = str(tmp_path / "own.py")
    own.cache = OtherCache()
    for name, module in {"own": own, "lazy": Lazy("lazy"), "no_module": object()}.items():
        monkeypatch.setitem(sys.modules, name, module)
    module_caches.find()
    names = {module.__name__ for module in module_caches._modules}
    assert "own" in names
    assert not names & {"lazy", "numpy", "sys", "fedexec", "__main__"}
    assert not any(name.startswith("own.") for name in module_caches.empty())


def test_variables_that_are_empty_and_those_that_are_filled(monkeypatch):
    module: Any = types.ModuleType("own")
    module.data, module.seen, module.net, module.answer = None, [], {}, 42
    module.cached = functools.lru_cache(lambda number: number)
    monkeypatch.setattr(module_caches, "_modules", [module])
    before = module_caches.empty()
    assert before == {"own.data", "own.seen", "own.net", "own.cached"}
    module.data = 0
    module.seen.append(1)
    module.cached(1)
    module.answer = 43
    module.more = [1]
    assert module_caches.filled(before) == ("own.data", "own.seen", "own.cached")
