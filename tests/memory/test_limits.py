"""Limits: a worker above one is replaced after its task, or ended while it runs."""

import jobs
import pytest

import fedexec
from fedexec.devices.device import Device
from fedexec.errors import SettingsError

MIB = 1 << 20
CONTEXT = 450 * MIB

FIND_DEVICES = "fedexec._scheduling.settings_checks.find_devices"


@pytest.mark.parametrize(("backend", "options"), [("loky", {}), ("standby", {"max_tasks_per_child": 100})])
def test_a_worker_above_its_device_limit_is_replaced(emulate, backend, options):
    gpu = emulate()
    limit = CONTEXT + 150 * MIB
    with fedexec.create_executor(backend, max_workers=1, device_memory_limit=limit, **options) as executor:
        futures = [executor.submit(jobs.hold, size * MIB) for size in (20, 100, 200, 20)]
        pids = []
        for future in futures:
            future.result()
            assert future.usage is not None
            pids.append(future.usage.worker_pid)
        assert pids[0] == pids[1] == pids[2] != pids[3], "only the third task left too much"
        assert executor.stats().restarts == {"device memory": 1}
        assert gpu.used_bytes() == CONTEXT + 20 * MIB


@pytest.mark.thorough
def test_a_leaking_worker_never_begins_a_task_above_its_limit():
    """200 tasks that keep 200 MB each: none is lost, whatever had to be replaced."""
    pytest.importorskip("loky")
    limit = 500 * MIB
    with fedexec.create_executor("loky", max_workers=2, memory_limit=limit) as executor:
        results = [
            future.result() for future in [executor.submit(jobs.leak, 200 * 10**6) for _ in range(200)]
        ]
        stats = executor.stats()
    assert len(results) == 200
    assert max(before for before, _ in results) <= limit
    assert (stats.succeeded, stats.worker_deaths) == (200, 0)
    assert stats.restarts["host memory"] >= 60  # at most three tasks fit into one worker


def test_a_limit_below_a_bare_worker_is_said_once_and_the_work_is_done(caplog):
    pytest.importorskip("loky")
    with fedexec.create_executor("loky", max_workers=1, memory_limit=MIB) as executor:
        assert list(executor.map(abs, range(4))) == [0, 1, 2, 3]
        assert executor.stats().restarts == {"host memory": 4}
    assert caplog.text.count("less than the") == 1


def test_a_device_limit_below_a_bare_context_is_said_once_too(emulate, caplog):
    pytest.importorskip("loky")
    emulate()
    with fedexec.create_executor("loky", max_workers=1, device_memory_limit=CONTEXT // 2) as executor:
        assert [executor.submit(jobs.touch, 5 * MIB).result() for _ in range(3)] == [CONTEXT + 20 * MIB] * 3
        assert executor.stats().restarts == {"device memory": 3}
    assert caplog.text.count("less than the 450 MiB that a worker holds") == 1


def test_a_device_limit_that_cannot_be_kept_is_said_once(emulate, caplog):
    pytest.importorskip("loky")
    emulate()
    with fedexec.create_executor(
        "loky", max_workers=1, device_memory_limit=CONTEXT, initializer=jobs.tell_no_device_bytes
    ) as executor:
        assert len(list(executor.map(jobs.touch, [5 * MIB] * 3))) == 3
    assert caplog.text.count("the limit of device memory cannot be kept") == 1


@pytest.mark.parametrize("backend", ["process", "pool", "standby", "loky"])
def test_a_running_task_above_its_host_limit_is_ended_alone(backend):
    with fedexec.create_executor(
        backend, max_workers=2, memory_limit=300 * MIB, enforce_limits=True, retries=2
    ) as executor:
        large = executor.submit(jobs.use_host, 600 * MIB, 60.0)
        others = [executor.submit(pow, 2, number) for number in range(10)]
        error = large.exception(30)
        assert isinstance(error, fedexec.WorkerMemoryError)
        assert isinstance(error, MemoryError)
        assert error.held > error.limit == 300 * MIB
        assert f"held {error.held >> 20} MiB of host memory" in str(error)
        assert [future.result(30) for future in others] == [2**number for number in range(10)]
        stats = executor.stats()
        assert (stats.memory_kills, stats.worker_deaths, stats.retries) == (1, 0, 0)


@pytest.mark.parametrize("backend", ["process", "pool", "standby", "loky"])
def test_a_running_task_above_its_device_limit_is_ended_alone(emulate, tmp_path, backend):
    gpu = emulate()
    with fedexec.create_executor(
        backend, max_workers=2, device_memory_limit="1GiB", enforce_limits=True
    ) as executor:
        large = executor.submit(jobs.hold, 2 << 30, tmp_path)
        error = large.exception(30)
        assert isinstance(error, fedexec.WorkerMemoryError)
        assert error.held == CONTEXT + (2 << 30)
        assert "EMULATED GPU 0" in str(error)
        assert gpu.used_bytes() == 0
        assert executor.submit(jobs.hold, 100 * MIB).result(30)[0] == "EMULATED-0"


class SeenFromAContainer(Device):
    """Lists the host's pids, one of which is the worker's by chance."""

    uuid, name = "GPU-host", "GPU whose pids are the host's"

    def __init__(self):
        self.workers = []

    def total_bytes(self):
        return 80 << 30

    def used_bytes(self):
        return 40 << 30

    def process_bytes(self):
        return dict.fromkeys(self.workers, 40 << 30) | {(1 << 22) + 1: 1 << 30}  # no pid is as large


def test_nobody_is_ended_for_what_another_process_of_that_pid_holds(monkeypatch):
    gpu = SeenFromAContainer()
    monkeypatch.setattr(FIND_DEVICES, lambda choice, named_by: (gpu,))
    monkeypatch.setattr("fedexec._scheduling.limit_enforcer.DEVICE_EVERY", 1)
    with fedexec.create_executor(
        "process", max_workers=1, device_memory_limit="1GiB", enforce_limits=True
    ) as executor:
        future = executor.submit(jobs.use_host, MIB, 0.5)
        while not (running := executor.running()) or running[0].pid is None:
            pass
        gpu.workers.append(running[0].pid)
        assert future.result() == MIB


def test_without_being_asked_to_nothing_that_runs_is_ended():
    with fedexec.create_executor("process", max_workers=1, memory_limit=100 * MIB) as executor:
        assert executor.submit(jobs.use_host, 300 * MIB, 0.3).result() == 300 * MIB


@pytest.mark.parametrize("value", ["a lot", 0, -5, True])
def test_limits_that_make_no_sense_are_refused(value):
    with pytest.raises(SettingsError, match="device_memory_limit"):
        fedexec.create_executor("inline", device_memory_limit=value)


@pytest.mark.parametrize(
    ("backend", "more", "is_told"),
    [
        ("standby", {}, True),
        ("process", {}, True),
        ("pool", {}, True),
        ("standby", {"max_tasks_per_child": 2}, False),
        ("standby", {"enforce_limits": True}, False),
        ("loky", {}, False),
    ],
)
def test_a_limit_that_changes_nothing_is_said_to_once(caplog, backend, more, is_told):
    if backend == "loky":
        pytest.importorskip("loky", reason="needs loky: pip install 'fedexec[loky]'")
    with fedexec.create_executor(backend, max_workers=2, memory_limit="1GiB", **more) as executor:
        list(executor.map(abs, range(4)))
    told = [message for message in caplog.messages if "has no effect" in message]
    assert len(told) == is_told
    if is_told:
        assert told[0].startswith(f"memory_limit has no effect on backend {backend}, ")
