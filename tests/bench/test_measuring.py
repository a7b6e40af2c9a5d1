"""What measures: the statistics, the fingerprints, the plan."""

import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from fedexec._bench.digests import digest
from fedexec._bench.estimate import Estimate, usual_seconds
from fedexec._bench.peers import contestants
from fedexec._bench.plan import MODES, Part, plan
from fedexec._bench.running import measure
from fedexec._bench.stats import statistics_of
from fedexec._bench.workloads import BUILT_IN, OwnTask
from fedexec._report.schema import FRESH, parts_of


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 7, 8, 9, 10, 15])
def test_the_statistics_are_those_of_pytest_benchmark(rounds):
    stats = pytest.importorskip("pytest_benchmark.stats").Stats()
    draw = random.Random(rounds)
    data = [draw.lognormvariate(0, 1) for _ in range(rounds)]
    for value in data:
        stats.update(value)
    ours = statistics_of(data)
    assert ours.pop("data") == data
    assert ours.pop("iterations") == 1
    expected = stats.as_dict()
    assert ours.pop("outliers") == expected["outliers"]
    assert ours == pytest.approx({name: expected[name] for name in ours})


def test_a_digest_tells_bits_apart():
    array = np.arange(3.0)
    assert digest([array, 1]) == digest([array.copy(), 1])
    assert digest([array]) != digest((array,))
    assert digest(array) != digest(array.astype(np.float32))
    assert digest(array) != digest(np.nextafter(array, 9))
    assert digest({"a": 1}) != digest({"a": 2})


@pytest.mark.parametrize("mode", MODES)
def test_every_part_has_a_name_of_its_own_and_travels(mode):
    for own in (None, OwnTask("mine:fit", "mine:arguments")):
        parts = plan(mode, own)
        assert len({part.name for part in parts}) == len(parts)
        for part in parts:
            assert Part.from_dict(part.as_dict()) == part
            assert parts_of(part.name)[:2] == (part.group, part.strategy)


def test_the_plan_has_every_group():
    groups = {part.group for part in plan("smoke")}
    assert groups == {"start-up", "overhead", "transport", "round", "footprint", "scaling", "faults"}


@pytest.mark.thorough_but("smoke")
@pytest.mark.parametrize("mode", MODES)
def test_the_time_left_is_corrected_by_what_parts_took(mode):
    for own in (None, OwnTask("mine:fit", "mine:arguments")):
        parts = plan(mode, own)
        done, left = parts[:5], parts[5:]
        usual = {part.name: usual_seconds(part) for part in parts}
        assert min(usual.values()) > 0
        estimate = Estimate()
        assert estimate.seconds(left) == pytest.approx(sum(usual[part.name] for part in left))
        estimate.add(done, 3 * sum(usual[part.name] for part in done))
        assert estimate.seconds(left) == pytest.approx(3 * sum(usual[part.name] for part in left))
        assert estimate.seconds([]) == 0


WARMS_UP = """
import sys
from fedexec._bench.workloads import BUILT_IN
from fedexec.devices.discovery import find_devices
(device,) = find_devices()
BUILT_IN[sys.argv[1]].warmup()
print(device.used_bytes())
"""


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name, job in BUILT_IN.items() if job.warmup])
def test_a_warm_up_touches_no_device(name):
    if missing := BUILT_IN[name].missing:
        pytest.skip(f"needs {missing}")
    command = [sys.executable, "-c", WARMS_UP, name]
    environ = os.environ | {"FEDEXEC_DEVICE": "emulated:24GiB"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("0", 0), done.stderr


CLEANS_UP = """
import atexit, os, time

def clean_up():
    time.sleep(0.3)
    os.rename("made", "cleaned up")

def fit():
    if not os.path.exists("made"):
        open("made", "x").close()
        atexit.register(clean_up)
"""


def test_a_process_that_has_measured_cleans_up_undisturbed(tmp_path, monkeypatch):
    (tmp_path / "tidy.py").write_text(CLEANS_UP)
    monkeypatch.chdir(tmp_path)
    own = OwnTask("tidy:fit")
    (benchmark,) = measure([Part(group="round", strategy="inline", workload=own.task, own=own)], 60)
    assert "error" not in benchmark
    assert (tmp_path / "cleaned up").exists()


TELLS_WHEN = """
import time

def hang():
    time.sleep(600)

def fit():
    began = time.monotonic()
    time.sleep(0.2)
    with open("when", "a") as file:
        print(began, time.monotonic(), file=file)
"""


def test_what_is_measured_in_turns_computes_while_nobody_else_does(tmp_path, monkeypatch):
    (tmp_path / "telling.py").write_text(TELLS_WHEN)
    monkeypatch.chdir(tmp_path)
    own = OwnTask("telling:fit")
    part = Part(group="round", strategy="inline", workload=own.task, own=own, rounds=2)
    for benchmark in measure([part, part], 60):
        assert benchmark["extra_info"]["fedexec"]["phases"]["compute"] >= 0.2
    when = [tuple(map(float, line.split())) for line in (tmp_path / "when").read_text().splitlines()]
    assert len(when) == 2 * (2 + 2), "two rounds of a client, and two alone before them"
    ordered = sorted(when)
    assert all(end <= began for (_, end), (began, _) in itertools.pairwise(ordered))


@pytest.mark.thorough
def test_one_that_hangs_is_named_and_spoils_nobody_elses_turn(tmp_path, monkeypatch):
    (tmp_path / "telling.py").write_text(TELLS_WHEN)
    monkeypatch.chdir(tmp_path)
    parts = [
        Part(group="round", strategy="inline", workload=task, own=OwnTask(task))
        for task in ("telling:fit", "telling:hang", "telling:fit")
    ]
    first, hung, last = measure(parts, 20)
    assert hung == {"error": "took longer than 20 s"}
    assert first["stats"]["median"] >= 0.2
    assert last["stats"]["median"] >= 0.2


def test_one_that_dies_is_named(tmp_path, monkeypatch):
    (tmp_path / "dying.py").write_text("import os\ndef fit(): os._exit(7)\n")
    monkeypatch.chdir(tmp_path)
    own = OwnTask("dying:fit")
    (benchmark,) = measure([Part(group="round", strategy="inline", workload=own.task, own=own)], 60)
    assert benchmark == {"error": "its process ended with 7"}


PLUG_IN = """
from fedexec_backends.standby import StandbyBackend

class Mine(StandbyBackend):
    pass
"""


def test_a_plug_in_is_asked_what_it_promises(tmp_path, monkeypatch):
    (tmp_path / "plugged.py").write_text(PLUG_IN)
    (tmp_path / "plugged-1.dist-info").mkdir()
    (tmp_path / "plugged-1.dist-info" / "METADATA").write_text("Name: plugged\nVersion: 1\n")
    (tmp_path / "plugged-1.dist-info" / "entry_points.txt").write_text(
        "[fedexec.backends]\nmine = plugged:Mine\nbroken = plugged:Missing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert contestants()["mine"].isolation == FRESH
    assert contestants()["mine"].missing is None
    assert "broken" in str(contestants()["broken"].missing)
