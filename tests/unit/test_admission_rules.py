"""Which task may start, and on which device: the rules alone, with devices that are fakes."""

import pytest
from fakes import FakeDevice, usage

from fedexec._scheduling import admission
from fedexec._scheduling.admission import Admission
from fedexec.interface import Outcome, Task
from fedexec.settings import resolve

GIB = 1 << 30


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(admission, "available_cores", lambda: 4)
    monkeypatch.setattr("fedexec.memory.host.available_bytes", lambda: 1000 * GIB)


def rules(*devices, fresh=True, **arguments):
    settings = resolve({"max_workers": "auto"} | arguments, environ={})
    return Admission(settings, devices, fresh=fresh)


def fit():
    """Name a kind of task."""


def test():
    """Name another."""


def task(fn=fit):
    return Task(fn, (), {})


def run(decides, one, **cost):
    """Let a task start and end; return whether it is to run once more."""
    assert decides.admit(one)
    return decides.release(one, Outcome(usage=usage(**cost)))


def admitted(decides, number=200, fn=fit):
    """Return how many tasks may run at once."""
    tasks = [task(fn) for _ in range(number)]
    return [each for each in tasks if decides.admit(each)]


def test_the_first_of_a_kind_runs_alone_then_as_many_as_fit():
    decides = rules(FakeDevice("GPU-a", 10 * GIB))
    first = task()
    assert decides.admit(first)
    assert not decides.admit(task())
    decides.release(first, Outcome(usage=usage(device=2 * GIB, host=GIB)))
    assert len(admitted(decides)) == 4  # 9 of 10 GiB are to be filled
    assert decides.footprints()[first.kind].at_once == 4


def test_another_kind_is_measured_alone_too():
    decides = rules(FakeDevice("GPU-a", 10 * GIB))
    run(decides, task(), device=2 * GIB)
    running = task()
    assert decides.admit(running)
    assert not decides.admit(task(test))
    decides.release(running, Outcome(usage=usage(device=2 * GIB)))
    assert decides.admit(task(test))


def test_what_others_use_is_not_there():
    decides = rules(FakeDevice("GPU-a", 10 * GIB, used=5 * GIB))
    run(decides, task(), device=2 * GIB)
    assert len(admitted(decides)) == 2


def test_several_devices_share_the_work_and_each_task_is_told_its_own():
    decides = rules(FakeDevice("GPU-a", 10 * GIB), FakeDevice("GPU-b", 20 * GIB))
    run(decides, task(), device=4 * GIB)
    devices = [each.device for each in admitted(decides)]
    assert sorted(devices) == ["GPU-a"] * 2 + ["GPU-b"] * 4


def test_tasks_without_a_device_are_bounded_by_cores_and_by_the_hosts_memory(monkeypatch):
    decides = rules()
    run(decides, task(), host=GIB)
    assert len(admitted(decides)) == 4
    monkeypatch.setattr("fedexec.memory.host.available_bytes", lambda: 3 * GIB)
    decides = rules()
    run(decides, task(), host=GIB)
    assert len(admitted(decides)) == 2


def test_out_of_memory_in_company_halves_the_number_and_is_tried_again_alone():
    decides = rules(FakeDevice("GPU-a", 100 * GIB))
    run(decides, task(), device=GIB)
    running = admitted(decides, 8)
    unlucky = running.pop()
    assert decides.release(unlucky, Outcome(exception=MemoryError(), out_of_memory=True))
    assert not decides.admit(unlucky)
    assert not decides.admit(task())  # nothing starts before the task that waits to be alone
    for each in running:
        decides.release(each, Outcome(usage=usage(device=GIB)))
    assert not run(decides, unlucky, device=GIB)
    assert len(admitted(decides)) == 4


def test_out_of_memory_alone_is_final():
    decides = rules(FakeDevice("GPU-a", GIB))
    alone = task()
    assert decides.admit(alone)
    assert not decides.release(alone, Outcome(exception=MemoryError(), out_of_memory=True))


def test_a_worker_that_stays_counts_as_much_as_the_largest_kind():
    decides = rules(FakeDevice("GPU-a", 10 * GIB), fresh=False)
    run(decides, task(), device=4 * GIB)
    run(decides, task(test), device=GIB)
    assert len(admitted(decides, fn=test)) == 2


def test_a_fixed_number_asks_for_no_memory():
    decides = rules(FakeDevice("GPU-a", GIB), FakeDevice("GPU-b", GIB), max_workers=3)
    assert [each.device for each in admitted(decides, 4)] in (
        ["GPU-a", "GPU-b", "GPU-a", "GPU-b"],
        ["GPU-b", "GPU-a", "GPU-b", "GPU-a"],
    )


test.__test__ = False  # type: ignore[attr-defined]  # the name of a kind, not of a test
