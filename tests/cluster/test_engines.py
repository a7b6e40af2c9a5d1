"""The engines themselves, each on a cluster that it starts here; the suites are in test_suites.py."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fedexec
from fedexec.testing import bad_tasks
from fedexec.testing.tasks import DEADLINE

ENGINES = {"dask": "distributed", "ray": "ray"}


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    pytest.importorskip(ENGINES[request.param])
    for name in os.environ:
        if name.startswith(("FEDEXEC_", "RAY_ADDRESS")):
            monkeypatch.delenv(name)
    return request.param


def test_an_engine_runs_tasks_as_standby_does(engine, capfd):
    weights = np.arange(1 << 18, dtype=float)
    with fedexec.create_executor("standby", seed=42) as executor:
        expected = executor.submit(bad_tasks.draw).result(DEADLINE)
    with fedexec.create_executor(engine, seed=42, retries=1) as executor:
        (node,) = executor.nodes()
        assert node.versions["fedexec"] == fedexec.__version__
        assert executor.submit(bad_tasks.draw).result(DEADLINE) == expected
        assert [total[0] for total in executor.map(np.add, [weights] * 6, range(6))] == list(range(6))
        pids = list(executor.map(lambda _: os.getpid(), range(4)))
        assert len({*pids, os.getpid()}) == 5, "each task has a process of its own"
        assert executor.submit(pow, 2, b=3).exception(DEADLINE) is not None
        with pytest.raises(ZeroDivisionError):
            executor.submit(divmod, 1, 0).result(DEADLINE)
        with pytest.raises(fedexec.WorkerDiedError, match="exited with code 3"):
            executor.submit(os._exit, 3).result(DEADLINE)
        with pytest.raises(fedexec.TaskTimeoutError):
            executor.with_options(timeout=0.5).submit(time.sleep, 60).result(DEADLINE)
        executor.submit(print, "printed on a node").result(DEADLINE)
        future = executor.submit(abs, -1)
        assert future.result(DEADLINE) == 1
        assert future.usage is not None
        assert future.usage.node == node.host
    assert "printed on a node" in capfd.readouterr().out


def test_a_cluster_outlives_the_thread_that_has_made_the_executor(engine):
    made = []
    maker = threading.Thread(target=lambda: made.append(fedexec.create_executor(engine)))
    maker.start()
    maker.join()
    time.sleep(1.0)  # the kernel ends at once what is to end with a thread; Ray notices some time later
    with made[0] as executor:
        assert list(executor.map(abs, range(4))) == [0, 1, 2, 3]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1", "no address at all"])
def test_no_cluster_at_the_address_is_told(engine, address):
    begun = time.monotonic()
    with pytest.raises(fedexec.BackendUnavailableError, match=rf"(?s){engine}.*{address}"):
        fedexec.create_executor(engine, **{f"{engine}_address": address})
    assert time.monotonic() - begun < 20


def test_an_engine_that_is_not_installed_gets_the_command(engine):
    script = (
        f"import sys; sys.modules[{ENGINES[engine]!r}] = None\n"
        f"import fedexec; fedexec.create_executor({engine!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert f"pip install 'fedexec[{engine}]'" in done.stderr


GPUS_ARE_HELD = """
import fedexec, fedexec_backends.ray, ray

ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, configure_logging=False)

class Trainer:
    def ready(self):
        return True

trainer = ray.remote(num_gpus=1)(Trainer).remote()
ray.get(trainer.ready.remote())
fedexec_backends.ray.CREATE_SECONDS = 2.0
try:
    fedexec.create_executor("ray")
except fedexec.BackendUnavailableError as exc:
    print(exc)
"""


def test_who_holds_the_gpus_of_a_node_is_told():
    pytest.importorskip("ray")
    command = [sys.executable, "-c", GPUS_ARE_HELD]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        "within 2 s; it needs all 1 GPU(s) of the node; actors that run there: Trainer (process"
        in done.stdout
    )


THROUGH_RAYS_CLIENT = """
import os, sys
import fedexec

with fedexec.create_executor("ray", ray_address=sys.argv[1]) as executor:
    assert list(executor.map(sum, [[1.0] * 300_000] * 3)) == [300_000.0] * 3
    assert executor.submit(os.getpid).result(60) != os.getpid()
    error = executor.submit(os._exit, 3).exception(60)
    assert error.node == executor.nodes()[0].name, error.node
"""


@pytest.mark.thorough
def test_tasks_run_through_rays_client(ray_cluster):
    pytest.importorskip("grpc", reason="Ray's client needs it")
    command = [sys.executable, "-c", THROUGH_RAYS_CLIENT, ray_cluster.client_address()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


AGENTS_THAT_DIE = """
import gc, os, signal, sys, time
import numpy as np, psutil
from distributed import Client
import fedexec

def last(array):
    return int(array[-1])

with Client(sys.argv[1]) as client:
    executor = fedexec.create_executor("dask", dask_address=sys.argv[1], node_workers=4)
    futures = [executor.submit(last, np.full(50_000_000, number, np.uint8)) for number in range(16)]
    time.sleep(0.4)
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        is_of_cluster = sys.argv[2] in [str(each.pid) for each in process.parents()]
        if "fedexec.cluster.agent_process" in command and is_of_cluster:
            process.kill()
    errors = [future.exception(60) for future in futures]
    executor.shutdown()
    assert any(isinstance(error, fedexec.NodeLostError) for error in errors), errors
    for _ in range(3):
        client.run(gc.collect)
    assert len(client.scheduler_info(n_workers=-1)["workers"]) == 2
"""


@pytest.mark.thorough
def test_the_death_of_a_node_agent_with_large_arguments_on_their_way_harms_no_dask_worker(dask_cluster):
    command = [sys.executable, "-c", AGENTS_THAT_DIE, dask_cluster.address, str(dask_cluster.pid)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_dask_cluster_that_needs_certificates_says_how_to_give_them():
    pytest.importorskip("distributed")
    with pytest.raises(fedexec.BackendUnavailableError, match=r"needs certificates.*distributed\.comm\.tls"):
        fedexec.create_executor("dask", dask_address="tls://127.0.0.1:8786")
