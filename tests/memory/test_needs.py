"""What a caller says that a task needs: the task waits for it, or the caller is told that it is too much."""

import os
import threading
import time

import pytest

import fedexec
from fedexec.testing.tasks import DEADLINE

GIB = 1 << 30


class Together:
    """Counts how many tasks run at the same time, by files in a directory."""

    def __init__(self, directory):
        self.directory = str(directory)

    def __call__(self, seconds=0.3):
        mark = os.path.join(self.directory, f"{os.getpid()}-{threading.get_ident()}")  # noqa: PTH118
        with open(mark, "w"):  # noqa: PTH123
            end = time.monotonic() + seconds
            most = 0
            while time.monotonic() < end:
                most = max(most, len(os.listdir(self.directory)))  # noqa: PTH208
                time.sleep(0.005)
        os.unlink(mark)  # noqa: PTH108
        return most


@pytest.mark.parametrize("backend", ["standby", "inline"])
@pytest.mark.parametrize("workers", [4, "auto"])
def test_two_tasks_that_the_device_cannot_hold_never_run_together(emulate, tmp_path, workers, backend):
    """EMULATED: a device of 3 GiB."""
    emulate("emulated:3GiB,context=100MiB")
    with fedexec.create_executor(backend, max_workers=workers) as executor:
        task = Together(tmp_path)
        large, small = executor.with_options(device_memory="2GiB"), executor.with_options(device_memory=GIB)
        assert [future.result(DEADLINE) for future in [large.submit(task) for _ in range(3)]] == [1, 1, 1]
        if workers == 4:
            assert max(future.result(DEADLINE) for future in [small.submit(task) for _ in range(6)]) == 3
            assert max(future.result(DEADLINE) for future in [executor.submit(task) for _ in range(4)]) == 4


def test_host_memory_and_threads_are_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr("fedexec.memory.host.available_bytes", lambda: 4 * GIB)
    monkeypatch.setattr("fedexec._scheduling.admission.available_cores", lambda: 2)
    with fedexec.create_executor(max_workers=4, threads_per_worker=1) as executor:
        task = Together(tmp_path)
        for needs, most in (({"memory": "1.5GiB"}, 2), ({"threads": 2}, 1), ({"threads": 1}, 2)):
            futures = [executor.with_options(**needs).submit(task) for _ in range(4)]
            assert max(future.result(DEADLINE) for future in futures) == most, needs


def test_what_is_there_is_measured_for_the_first_that_asks_although_others_run(tmp_path, monkeypatch):
    monkeypatch.setattr("fedexec.memory.host.available_bytes", lambda: 2 * GIB)
    with fedexec.create_executor("inline", max_workers=4) as executor:
        others = executor.submit(time.sleep, 1.5)
        asking = executor.with_options(memory="1.5GiB")
        futures = [asking.submit(Together(tmp_path)) for _ in range(3)]
        assert [future.result(DEADLINE) for future in futures] == [1, 1, 1]
        others.result(DEADLINE)


@pytest.mark.parametrize("backend", ["standby", "process", "pool", "loky"])
def test_the_libraries_of_a_task_use_the_threads_that_it_asked_for(backend):
    if backend == "loky":
        pytest.importorskip("loky")
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("needs two cores")
    with fedexec.create_executor(backend, max_workers=1, threads_per_worker=1) as executor:
        asked = executor.with_options(threads=2)
        assert asked.submit(os.getenv, "OMP_NUM_THREADS").result(DEADLINE) == "2"
        assert executor.submit(os.getenv, "OMP_NUM_THREADS").result(DEADLINE) == "1"
        pytest.importorskip("torch")
        import_torch = "__import__('torch').get_num_threads()"
        assert executor.submit(eval, import_torch).result(DEADLINE) == 1
        assert asked.submit(eval, import_torch).result(DEADLINE) == 2


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ({"memory": 1 << 60}, r"a task needs .* of memory, and there are"),
        ({"device_memory": 25 * GIB}, r"a task needs 25\.0 GiB of one device, and there are 24\.0 GiB"),
        ({"threads": 1 << 20}, r"a task needs 1048576 threads, and there are \d+ cores"),
        ({"threads": 0}, "threads must be an integer of at least 1, got 0"),
        ({"threads": True}, "threads must be an integer of at least 1, got True"),
        ({"memory": "much"}, "memory: "),
    ],
)
def test_what_no_machine_can_meet_is_an_error_at_once(emulate, needs, said):
    emulate()
    with (
        fedexec.create_executor("inline") as executor,
        pytest.raises(fedexec.SettingsError, match=said),
    ):
        executor.with_options(**needs)


def test_a_device_where_there_is_none_is_an_error(monkeypatch):
    monkeypatch.setenv("FEDEXEC_DEVICE", "none")
    with (
        fedexec.create_executor("inline") as executor,
        pytest.raises(fedexec.SettingsError, match="a task needs a device, and there is none"),
    ):
        executor.with_options(device_memory="1GiB")
