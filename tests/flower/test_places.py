"""The same apps, unchanged, in the three places an app can run: here, on Flower's engine, on SuperNodes.

The example learns the same in each; functions of `offload_app` run in workers of their own in each.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest

from fedexec.flower.grpc.address import free_address, split_address
from fedexec.testing.tasks import poll

pytest.importorskip("ray", reason="Flower's own engine needs ray: pip install 'flwr[simulation]'")

pytestmark = [pytest.mark.flower, pytest.mark.torch]

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart-fedexec"
OFFLOADED = Path(__file__).parent / "offload_app"
ROOT = Path(__file__).parents[2]
SMALL = {"fraction_train": 1.0, "local_epochs": 1, "num_server_rounds": 1}


def program(name):
    return str(Path(sys.executable).with_name(name))


class Place:
    """A SuperLink on loopback, in a home of its own, and what belongs to it."""

    def __init__(self, home):
        self.home = home
        self.port = split_address(free_address())[1]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("FEDEXEC_")}
        self.environment = clean | {
            "FLWR_HOME": str(home / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_TMPDIR": str(home),
            "RAY_USAGE_STATS_ENABLED": "0",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",  # as our workers have: sums over more threads round otherwise
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        }
        (home / "flwr").mkdir()
        (home / "flwr" / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n'
            f'[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        self.started = []

    def start(self, name, *args):
        with (self.home / f"{name}-{len(self.started)}.log").open("wb") as log:
            process = psutil.Popen(
                [program(name), *args],
                env=self.environment, cwd=self.home, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self.started.append(process)

    def start_superlink(self, *args):
        address = ("--insecure", "--host", "127.0.0.1", "--port", str(self.port))
        self.start("flower-superlink", *address, "--disable-runtime-dependency-installation", *args)
        poll(self._is_healthy, "the SuperLink answers", seconds=60)

    def _is_healthy(self):
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1).status == 200
        assert self.started[0].poll() is None, self.logs()
        return False

    def run(self, app, *args):
        done = subprocess.run(
            [program("flwr"), "run", str(app), "here", "--stream", *args],
            env=self.environment, cwd=self.home, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout

    def logs(self):
        return "".join(log.read_text() for log in self.home.glob("*.log"))

    def close(self):
        running = [process for process in self.started if process.poll() is None]
        family = [child for process in running for child in process.children(recursive=True)]
        for process in reversed(running):
            process.send_signal(signal.SIGINT)
        _, alive = psutil.wait_procs(running + family, timeout=20)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive)


@pytest.fixture
def place():
    home = Path(tempfile.mkdtemp(prefix="fx"))  # short: Ray puts sockets there, whose paths have a limit
    place = Place(home)
    try:
        yield place
    finally:
        place.close()
        shutil.rmtree(home)


def is_running(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def simulate(app, *args):
    subprocess.run(
        [sys.executable, "-m", "fedexec", "simulate", str(app), "--quiet", *args], check=True, timeout=300
    )


def assert_equal_weights(left, right):
    """Compare but for rounding: Flower adds up in the order of arrival. Another round would amplify it."""
    with np.load(left) as ours, np.load(right) as theirs:
        assert set(ours) == set(theirs)
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def config(**values):
    return "--run-config", " ".join(f"{key.replace('_', '-')}={value!r}" for key, value in values.items())


def test_on_flowers_engine(place, tmp_path):
    place.start_superlink("--simulation")
    federation = ("--federation-config", "num-supernodes=3 client-resources-num-cpus=1")
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    simulate(EXAMPLE, "--nodes", "3", *config(save_to=str(ours), **SMALL))
    place.run(EXAMPLE, *federation, *config(save_to=str(theirs), **SMALL))
    assert_equal_weights(ours, theirs)

    place.run(OFFLOADED, *federation, *config(report=str(tmp_path / "report.json")))
    assert_offloaded(json.loads((tmp_path / "report.json").read_text()), nodes=3)


def supernodes(place):
    """Return the arguments of each of two SuperNodes."""
    for partition in range(2):
        node_config = f"partition-id={partition} num-partitions=2"
        port = str(split_address(free_address())[1])
        address = ("--superlink", f"127.0.0.1:{place.port}", "--host", "127.0.0.1", "--port", port)
        yield "--insecure", *address, "--node-config", node_config


def test_on_a_superlink_with_two_supernodes(place, tmp_path):
    place.start_superlink()
    for words in supernodes(place):
        place.start("flower-supernode", *words)
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    simulate(EXAMPLE, "--nodes", "2", *config(save_to=str(ours), **SMALL))
    place.run(EXAMPLE, *config(save_to=str(theirs), **SMALL))
    assert_equal_weights(ours, theirs)

    place.run(OFFLOADED, *config(report=str(tmp_path / "report.json")))
    assert_offloaded(json.loads((tmp_path / "report.json").read_text()), nodes=2)


def test_on_supernodes_whose_client_apps_start_warm(place, tmp_path):
    place.start_superlink()
    place.start("fedexec", "supernode", *(word for words in supernodes(place) for word in ("--", *words)))
    ours, theirs = tmp_path / "ours.npz", tmp_path / "theirs.npz"
    simulate(EXAMPLE, "--nodes", "2", *config(save_to=str(ours), **SMALL))
    place.run(EXAMPLE, *config(save_to=str(theirs), **SMALL))
    assert_equal_weights(ours, theirs)
    assert place.logs().count("Start `flwr-clientapp` process") == 2
    assert "cold" not in place.logs()
    process = place.started[-1]
    family = process.children(recursive=True)
    assert len(family) > 2
    process.kill()
    poll(lambda: not any(map(is_running, family)), "all ended", seconds=5)


def test_here(tmp_path):
    simulate(OFFLOADED, "--nodes", "2", *config(report=str(tmp_path / "report.json")))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["server"] not in report["evaluated"]
    assert all(node["inside"] == node["outside"] for node in report["nodes"]), "a worker within a worker"
    assert [node["visits"] for node in report["nodes"]] == [1, 1, 2, 2]


def assert_offloaded(report, nodes):
    """Look at where things ran, and at the state that came back."""
    assert len(report["evaluated"]) == 3
    assert report["server"] not in report["evaluated"]
    assert len(set(report["evaluated"])) == 3, "each in a fresh process"
    assert all(node["inside"] != node["outside"] for node in report["nodes"]), report["nodes"]
    assert sorted(node["visits"] for node in report["nodes"]) == [1] * nodes + [2] * nodes
