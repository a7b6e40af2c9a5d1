"""``max_workers="auto"``: as many at once as memory allows, and never one more."""

import collections
import os

import jobs
import pytest

import fedexec
from fedexec._scheduling import admission
from fedexec._scheduling.admission import Admission, ceiling
from fedexec.devices.device import Device
from fedexec.devices.nvml import NvmlDevice
from fedexec.memory import host
from fedexec.settings import resolve

MIB, GIB = 1 << 20, 1 << 30
CONTEXT = 450 * MIB
ISOLATING = ["process", "pool", "standby", "loky"]

FIND_DEVICES = "fedexec._scheduling.settings_checks.find_devices"


@pytest.mark.thorough_but("standby")
@pytest.mark.parametrize("backend", ISOLATING)
@pytest.mark.parametrize(
    ("nbytes", "expected"),
    [
        (7 * GIB - CONTEXT, 3),  # by hand: 0.9 * 24 / 7 = 3.09
        (3700 * MIB - CONTEXT, 5),  # 0.9 * 24576 / 3700 = 5.98
        (2 * GIB - CONTEXT, 10),  # 0.9 * 24 / 2 = 10.8
    ],
)
def test_auto_runs_as_many_as_a_person_would_compute(emulate, tmp_path, backend, nbytes, expected):
    gpu = emulate()
    with fedexec.create_executor(backend, max_workers="auto") as executor:
        first = executor.submit(jobs.hold, nbytes)
        first.result()
        assert first.usage is not None
        assert first.usage.peak_device_bytes == CONTEXT + nbytes
        futures = [executor.submit(jobs.hold, nbytes, tmp_path) for _ in range(expected + 4)]
        while len(list(tmp_path.iterdir())) < expected:
            pass
        assert gpu.used_bytes() == expected * (CONTEXT + nbytes)
        assert executor.stats().running == expected
        (tmp_path / "go").touch()
        for future in futures:
            uuid, used = future.result()
            assert uuid == "EMULATED-0"
            assert used <= 0.9 * 24 * GIB
        assert executor.stats().failed == 0


@pytest.mark.thorough_but("standby")
@pytest.mark.parametrize("backend", ISOLATING)
def test_auto_never_runs_out_of_memory_and_fills_the_device(emulate, backend):
    emulate()
    with fedexec.create_executor(backend, max_workers="auto") as executor:
        used = [
            future.result() for future in [executor.submit(jobs.touch, 950 * MIB, 1.0) for _ in range(31)]
        ]
        assert executor.stats().as_dict() == executor.stats().as_dict() | {"failed": 0, "retries": 0}
    assert 0.85 * 24 * GIB <= max(used) <= 0.9 * 24 * GIB


def test_the_first_of_a_kind_runs_alone(emulate, tmp_path):
    emulate()
    with fedexec.create_executor("process", max_workers="auto") as executor:
        first = [executor.submit(jobs.hold, MIB, tmp_path) for _ in range(3)]
        while not list(tmp_path.iterdir()):
            pass
        other = executor.submit(jobs.touch, MIB)
        assert executor.stats().running == 1
        (tmp_path / "go").touch()
        for future in [*first, other]:
            future.result()
        assert set(executor.footprints()) == {"jobs.hold", "jobs.touch"}


def test_a_task_that_grows_is_tried_again_alone_and_the_others_are_halved(emulate, tmp_path):
    emulate("emulated:4GiB")
    with fedexec.create_executor("process", max_workers="auto") as executor:
        executor.submit(jobs.hold, 100 * MIB).result()  # looks as if six fitted
        grown = [executor.submit(jobs.hold, 3 * GIB, tmp_path) for _ in range(4)]
        while executor.stats().retries < 1:
            pass
        (tmp_path / "go").touch()
        assert [future.result()[0] for future in grown] == ["EMULATED-0"] * 4
        assert executor.stats().failed == 0
        assert executor.footprints()["jobs.hold"].device_bytes == CONTEXT + 3 * GIB


def test_a_task_that_waits_to_be_alone_is_not_lost_when_workers_are_killed(emulate, tmp_path):
    emulate("emulated:4GiB")
    executor = fedexec.create_executor("process", max_workers="auto")
    executor.submit(jobs.hold, 100 * MIB).result()
    holder = executor.submit(jobs.hold, 3 * GIB, tmp_path)
    while not list(tmp_path.iterdir()):
        pass
    grown = executor.submit(jobs.hold, 3 * GIB)
    while executor.footprints()["jobs.hold"].most is None:  # it has run out of memory, and waits
        pass
    queued = executor.submit(jobs.hold, MIB)
    executor.kill_workers()
    assert isinstance(holder.exception(0), fedexec.WorkerDiedError)
    assert "out of memory" in str(grown.exception(0))
    assert queued.cancelled()


def test_nothing_starts_before_the_task_that_waits_to_be_alone(emulate, tmp_path):
    emulate("emulated:4GiB")
    with fedexec.create_executor("process", max_workers="auto") as executor:
        executor.submit(jobs.hold, 100 * MIB).result()
        executor.submit(jobs.touch, MIB).result()
        holder = executor.submit(jobs.hold, 3 * GIB, tmp_path)
        while not list(tmp_path.iterdir()):
            pass
        grown = executor.submit(jobs.hold, 3 * GIB)
        while executor.footprints()["jobs.hold"].most is None:
            pass
        later = executor.submit(jobs.touch, MIB)
        assert executor.stats().queued == 1
        (tmp_path / "go").touch()
        assert [future.result(30) is not None for future in (holder, grown, later)] == [True] * 3
        assert executor.stats().retries == 1


def test_a_task_that_does_not_fit_even_alone_fails_with_its_own_error(emulate):
    emulate("emulated:1GiB")
    with fedexec.create_executor("process", max_workers="auto") as executor:
        future = executor.submit(jobs.touch, 5 * GIB)
        assert "out of memory" in str(future.exception())
        assert executor.submit(jobs.touch, MIB).result()


def test_tasks_without_a_device_are_bounded_by_the_cores(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDEXEC_DEVICE", "none")
    monkeypatch.setattr(admission, "available_cores", lambda: 3)
    with fedexec.create_executor("process", max_workers="auto") as executor:
        list(executor.map(jobs.use_host, [1]))
        futures = [executor.submit(jobs.use_host, MIB, 0.3) for _ in range(6)]
        seen = set()
        while not all(future.done() for future in futures):
            seen.add(executor.stats().running)
        assert max(seen) == 3


def test_host_memory_bounds_too(monkeypatch):
    if not host.reset_peak():
        pytest.skip("the system does not say how much memory a task held at most")
    monkeypatch.setenv("FEDEXEC_DEVICE", "none")
    monkeypatch.setattr(admission, "available_cores", lambda: 4)
    monkeypatch.setattr("fedexec.memory.host.available_bytes", lambda: 700 * MIB)
    with fedexec.create_executor("process", max_workers="auto") as executor:
        first = executor.submit(jobs.use_host, 200 * MIB)
        first.result()
        assert first.usage is not None and first.usage.peak_host_bytes is not None
        assert 200 * MIB < first.usage.peak_host_bytes < 300 * MIB  # so two fit into 630 MiB
        futures = [executor.submit(jobs.use_host, 200 * MIB, 0.3) for _ in range(6)]
        seen = set()
        while not all(future.done() for future in futures):
            seen.add(executor.stats().running)
        assert max(seen) == 2


@pytest.mark.parametrize("backend", ISOLATING)
def test_several_devices_share_the_work(emulate, backend):
    first, second = emulate("emulated:2x4GiB")
    with fedexec.create_executor(backend, max_workers=2) as executor:
        counts = collections.Counter(
            future.result()[0] for future in [executor.submit(jobs.hold, 3 * GIB) for _ in range(2)]
        )
        futures = [executor.submit(jobs.touch, 3 * GIB, 0.1) for _ in range(6)]
        assert all(CONTEXT + 3 * GIB <= future.result() <= 4 * GIB for future in futures)
        counts.update(future.usage.device if future.usage else None for future in futures)
    assert set(counts) == {"EMULATED-0", "EMULATED-1"}
    assert first.used_bytes() == second.used_bytes() == 0


def test_a_second_program_begins_with_the_other_device(emulate, tmp_path):
    emulate("emulated:2x4GiB")
    with fedexec.create_executor("process", max_workers=1) as one:
        holding = one.submit(jobs.hold, 3 * GIB, tmp_path)
        while not list(tmp_path.iterdir()):
            pass
        with fedexec.create_executor("process", max_workers=1) as other:
            second = other.submit(jobs.hold, 3 * GIB)
            second.exception()
        (tmp_path / "go").touch()
        assert {second.result()[0], holding.result()[0]} == {"EMULATED-0", "EMULATED-1"}


def test_auto_fills_several_devices(emulate, tmp_path):
    first, second = emulate("emulated:2x4GiB")
    with fedexec.create_executor("standby", max_workers="auto") as executor:
        executor.submit(jobs.hold, 1300 * MIB).result()
        futures = [executor.submit(jobs.hold, 1300 * MIB, tmp_path) for _ in range(6)]
        while len(list(tmp_path.iterdir())) < 4:
            pass
        assert first.used_bytes() == second.used_bytes() == 2 * (CONTEXT + 1300 * MIB)
        (tmp_path / "go").touch()
        for future in futures:
            future.result()


@pytest.mark.parametrize("backend", [*ISOLATING, "inline"])
def test_workers_see_the_device_that_was_chosen_and_no_other(monkeypatch, backend):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with fedexec.create_executor(backend, max_workers=1, device="none") as executor:
        assert executor.submit(jobs.where).result() == (None, "")
    found = (NvmlDevice("GPU-b", "the second of two"),)
    monkeypatch.setattr(FIND_DEVICES, lambda choice, named_by: found if choice == "1" else ())
    with fedexec.create_executor(backend, max_workers=1, device="1") as executor:
        assert executor.submit(jobs.where).result() == (None, "GPU-b")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_inline_uses_the_device_of_its_argument(monkeypatch, emulate):
    emulate()
    monkeypatch.delenv("FEDEXEC_DEVICE")
    with fedexec.create_executor("inline", max_workers="auto", device="emulated:2x4GiB") as executor:
        futures = [executor.submit(jobs.touch, GIB, 0.1) for _ in range(8)]
        assert [future.result() >= CONTEXT + GIB for future in futures] == [True] * 8
        assert executor.stats().retries == 0, "there is but one device that a task of this process can mean"
        assert executor.footprints()["jobs.touch"].device_bytes == CONTEXT + GIB


@pytest.mark.parametrize("backend", ["loky", "standby"])
def test_a_reused_worker_stays_on_its_device(emulate, backend):
    emulate("emulated:2x4GiB")
    most = 50 if backend == "standby" else None
    with fedexec.create_executor(backend, max_workers=3, max_tasks_per_child=most) as executor:
        devices = collections.defaultdict(set)
        for future in [executor.submit(jobs.hold, MIB) for _ in range(40)]:
            device = future.result()[0]
            assert future.usage is not None
            assert device == future.usage.device
            devices[future.usage.worker_pid].add(future.usage.device)
        assert all(len(seen) == 1 for seen in devices.values())


# ---------------------------------------------------------------- the decision itself


class Untold(Device):
    """A device whose processes nobody can see (a container): only its total is known."""

    uuid, name = "GPU-untold", "GPU that tells no pids"

    def __init__(self, source):
        self._source = source

    def total_bytes(self):
        return self._source.total_bytes()

    def used_bytes(self):
        return self._source.used_bytes() + 2 * GIB  # somebody else's

    def process_bytes(self):
        return None


def test_where_no_pid_is_told_the_device_is_watched_from_outside(emulate, monkeypatch, tmp_path):
    gpu = emulate()
    monkeypatch.setattr(FIND_DEVICES, lambda choice, named_by: (Untold(gpu),))
    with fedexec.create_executor("process", max_workers="auto", initializer=measure_no_device) as executor:
        first = executor.submit(jobs.touch, 5 * GIB - CONTEXT, 0.5)
        first.result()
        assert first.usage is not None
        assert first.usage.peak_device_bytes is None
        assert executor.footprints()["jobs.touch"].device_bytes == 5 * GIB
        futures = [executor.submit(jobs.touch, 5 * GIB - CONTEXT, 0.3) for _ in range(8)]
        assert max(future.result() for future in futures) == 3 * 5 * GIB  # 0.9 * (24 - 2) / 5 = 3.96


@pytest.mark.parametrize("backend", ["loky", "pool"])
def test_where_no_pid_is_told_torch_tells_what_a_later_task_took(emulate, monkeypatch, backend):
    gpu = emulate()
    monkeypatch.setattr(FIND_DEVICES, lambda choice, named_by: (Untold(gpu),))
    with fedexec.create_executor(
        backend, max_workers="auto", initializer=jobs.tell_no_device_bytes
    ) as executor:
        for nbytes in (2 * GIB, 3 * GIB):  # the second does not run alone
            executor.submit(jobs.touch, nbytes, 0.3).result()
        assert (executor.footprints()["jobs.touch"].device_bytes or 0) >= CONTEXT + 3 * GIB
        executor.submit(
            jobs.hold, 6 * GIB
        ).result()  # alone; in a worker that held much before, if it is reused
        assert (executor.footprints()["jobs.hold"].device_bytes or 0) >= CONTEXT + 6 * GIB


def measure_no_device():
    """Have this worker measure nothing of its device."""
    from fedexec.memory import self_usage

    self_usage.read = self_usage.OwnDevice
    self_usage.reset_peak = lambda: None


def usage(device_bytes):
    return fedexec.Usage(worker_pid=1, wall_seconds=1.0, cpu_seconds=1.0, peak_device_bytes=device_bytes)


def test_those_that_run_out_of_memory_together_halve_their_number_once(emulate):
    gate = Admission(resolve({"max_workers": "auto"}), (emulate(),), fresh=True)
    tasks = [fedexec.Task(abs, (1,), {}) for _ in range(9)]
    assert gate.admit(tasks[0])
    gate.release(tasks[0], fedexec.Outcome(usage=usage(2 * GIB)))
    assert [gate.admit(task) for task in tasks[1:]] == [True] * 8
    failed = fedexec.Outcome(exception=MemoryError(), usage=usage(2 * GIB), out_of_memory=True)
    assert [gate.release(task, failed) for task in tasks[1:]] == [True] * 8
    assert gate.footprints()["builtins.abs"].most == 4
    for task in tasks[1:]:  # each is tried alone; that it is too large even so tells nothing of the others
        assert gate.admit(task)
        assert not gate.release(task, failed)
    assert gate.footprints()["builtins.abs"].at_once == 4


def test_one_that_is_too_large_even_alone_does_not_hold_up_the_others(emulate):
    emulate("emulated:4GiB")
    with fedexec.create_executor("process", max_workers="auto") as executor:
        assert executor.submit(jobs.hold, 100 * GIB).exception()
        executor.submit(jobs.hold, MIB).result()
        assert executor.footprints()["jobs.hold"].at_once == 8  # 0.9 * 4096 / 452


def test_a_fixed_number_of_workers_admits_everything_and_measures_nothing():
    settings = resolve({"max_workers": 3})
    assert ceiling(settings, ()) == 3
    fixed = Admission(settings, (), fresh=True)
    task = fedexec.Task(abs, (1,), {})
    assert fixed.admit(task)
    assert not fixed.release(task, fedexec.Outcome(value=1))
    assert fixed.footprints() == {}
