"""What waits, what runs, how often, and what becomes of it: the scheduler alone, with a fake backend."""

import signal
import threading

import pytest
from fakes import DEADLINE, FakeBackend

from fedexec._scheduling import deadline
from fedexec._scheduling.admission import Admission
from fedexec._scheduling.scheduler import Scheduler
from fedexec.errors import InitializerError, TaskTimeoutError, WorkerDiedError
from fedexec.interface import Outcome, Task, once


class Scheduled:
    """A scheduler and its backend."""

    def __init__(self, **arguments):
        self.backend = FakeBackend(**({"max_workers": 1} | arguments))
        self.scheduler = Scheduler(
            self.backend, self.backend.settings, Admission(self.backend.settings, (), fresh=True), ()
        )
        self.gate = threading.Event()

    def submit(self, fn, *args, **options):
        settings = self.backend.settings
        return self.scheduler.submit(
            Task(fn, args, {}, **{"timeout": settings.timeout, "retries": settings.retries} | options)
        )

    def hold(self, name="holder"):
        """Occupy a slot until the gate opens; return once it is occupied."""
        begun = threading.Event()

        def wait(_):
            begun.set()
            return self.gate.wait(DEADLINE)

        future = self.submit(wait, name)
        assert begun.wait(DEADLINE)
        return future

    def end(self):
        self.gate.set()
        self.scheduler.close()
        self.scheduler.join()


@pytest.fixture
def scheduled():
    made = []

    def make(**arguments):
        made.append(Scheduled(**arguments))
        return made[-1]

    yield make
    for each in made:
        each.end()


def same(value):
    return value


def test_tasks_begin_in_the_order_in_which_they_were_submitted(scheduled):
    one = scheduled()
    one.hold()
    futures = [one.submit(same, number) for number in range(5)]
    one.gate.set()
    assert [future.result(DEADLINE) for future in futures] == list(range(5))
    assert one.backend.ran == ["holder", *range(5)]


def test_no_more_run_at_once_than_there_are_slots_and_what_waits_can_be_cancelled(scheduled):
    two = scheduled(max_workers=2)
    running = [two.hold("first"), two.hold("second")]
    waiting = [two.submit(same, number) for number in range(3)]
    assert (two.scheduler.stats().running, two.scheduler.stats().queued) == (2, 3)
    assert not running[0].cancel()
    assert waiting[1].cancel()
    two.gate.set()
    assert (waiting[0].result(DEADLINE), waiting[2].result(DEADLINE)) == (0, 2)
    assert 1 not in two.backend.ran
    two.end()
    assert two.scheduler.stats().cancelled == 1


@pytest.mark.parametrize(("heeds", "signals"), [(15, [15]), (9, [15, 9])])
def test_a_task_that_is_late_gets_sigterm_and_sigkill_if_that_does_not_help(
    scheduled, monkeypatch, heeds, signals
):
    monkeypatch.setattr(deadline, "GRACE_SECONDS", 0.05)
    one = scheduled(timeout=0.05)
    one.backend.heeds = heeds
    error = one.submit(one.backend.hang, 1).exception(DEADLINE)
    assert isinstance(error, TaskTimeoutError)
    assert one.backend.signals == signals
    assert (one.scheduler.stats().timeouts, one.scheduler.stats().worker_deaths) == (1, 0)


@pytest.mark.parametrize(("deaths", "retries", "runs"), [(2, 2, 3), (2, 1, 2), (0, 3, 1)])
def test_a_task_whose_worker_died_runs_again_as_often_as_asked(scheduled, deaths, retries, runs):
    one = scheduled(retries=retries)
    one.backend.deaths["it"] = deaths
    future = one.submit(same, "it")
    error = future.exception(DEADLINE)
    assert (error is None) == (deaths <= retries)
    assert error is None or isinstance(error, WorkerDiedError)
    assert one.backend.ran == ["it"] * runs
    assert one.scheduler.stats().retries == runs - 1


def test_what_must_not_run_twice_does_not(scheduled):
    one = scheduled(retries=5)
    one.backend.deaths["it"] = 1
    assert isinstance(one.submit(once(lambda value: value), "it").exception(DEADLINE), WorkerDiedError)
    assert one.backend.ran == ["it"]


def test_ending_a_task_cancels_it_while_it_waits_and_kills_its_worker_while_it_runs(scheduled):
    one = scheduled(retries=5)
    running = one.submit(one.backend.hang, 1)
    waiting = one.submit(same, 2)
    one.scheduler.end(waiting)
    assert waiting.cancelled()
    assert one.backend.signals == []
    while not running.running():
        assert not running.done()
    one.scheduler.end(running)
    assert isinstance(running.exception(DEADLINE), WorkerDiedError)
    assert one.backend.signals == [signal.SIGKILL]
    assert one.backend.ran == [1]  # an ended task is not tried again


def test_after_a_shutdown_nothing_is_taken_and_what_waited_is_done_or_cancelled(scheduled):
    for cancels, result in ((False, 1), (True, None)):
        one = scheduled()
        one.hold()
        waiting = one.submit(same, 1)
        one.scheduler.close(cancel_futures=cancels)
        with pytest.raises(RuntimeError, match="after shutdown"):
            one.submit(same, 2)
        one.gate.set()
        one.scheduler.join()
        assert waiting.cancelled() == cancels
        assert cancels or waiting.result(0) == result
        assert one.backend.shutdowns == 1


def test_a_scheduler_that_was_never_used_shuts_its_backend_down_once(scheduled):
    one = scheduled()
    one.scheduler.close()
    one.scheduler.close()
    one.scheduler.join()
    assert one.backend.shutdowns == 1


def test_a_worker_that_cannot_be_made_ready_breaks_all_that_waits_and_comes(scheduled):
    one = scheduled()
    first = one.hold()
    failures = [one.submit(same, number) for number in range(2)]
    one.backend.run = lambda task: Outcome(exception=InitializerError(7, "no data"))
    one.gate.set()
    assert first.result(DEADLINE)
    errors = [future.exception(DEADLINE) for future in failures]
    assert all(isinstance(error, InitializerError) for error in errors)
    assert errors[0] is not errors[1]
    with pytest.raises(InitializerError):
        one.submit(same, 3)


def test_each_tasks_seed_follows_from_its_number(scheduled):
    seeds = []
    for _ in range(2):
        one = scheduled(seed=7)
        tasks = [Task(same, (number,), {}) for number in range(3)]
        for task in tasks:
            one.scheduler.submit(task).result(DEADLINE)
        seeds.append([task.seed for task in tasks])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 3
