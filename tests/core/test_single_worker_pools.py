"""Workers of ``pool`` and ``loky`` that die at the worst moments."""

import concurrent.futures
import fcntl
import os
import select
import signal
import stat
import sys
import threading
import weakref
from pathlib import Path

import loky
import psutil
import pytest

import fedexec
from fedexec.testing.suite import AVAILABLE_START_METHODS
from fedexec.testing.tasks import DEADLINE, poll
from fedexec_backends._single_worker_pool import _Worker

pytestmark = pytest.mark.thorough_but("forkserver")

POOLS = {"pool": concurrent.futures.ProcessPoolExecutor, "loky": loky.ProcessPoolExecutor}


@pytest.fixture(params=POOLS)
def backend(request):
    return request.param


@pytest.fixture(params=AVAILABLE_START_METHODS)
def create(request, backend):
    made = []

    def make(**options):
        options = {"max_workers": 1, "start_method": request.param} | options
        made.append(fedexec.create_executor(backend, **options))
        return made[-1]

    yield make
    for executor in made:
        executor.kill_workers()


def descriptors():
    return [int(entry.name) for entry in Path("/dev/fd").iterdir()]


def test_a_worker_killed_while_it_is_handed_a_task_has_not_begun_it(create, backend, monkeypatch):
    executor = create()
    worker = executor.submit(os.getpid).result(DEADLINE)
    if backend == "pool":  # which starts the next by itself
        (worker,) = poll(lambda: workers() - {worker}, "there is an idle worker")
    os.kill(worker, signal.SIGSTOP)
    submit = POOLS[backend].submit
    handed: list[concurrent.futures.Future] = []

    def submit_and_kill(self, *args, **kwargs):
        future = submit(self, *args, **kwargs)
        if not handed:
            os.kill(worker, signal.SIGKILL)
        handed.append(future)
        return future

    monkeypatch.setattr(POOLS[backend], "submit", submit_and_kill)
    assert executor.submit(os.getpid).result(DEADLINE) != worker
    assert len(handed) == 2
    assert executor.stats().worker_deaths == 0


# Workers of the test that runs. They are listed while a pool's thread adds to them, which no WeakSet allows.
started: list[weakref.ref[_Worker]] = []


@pytest.fixture(autouse=True)
def note_workers(monkeypatch):
    start = _Worker.start

    def start_and_note(self):
        start(self)
        started.append(weakref.ref(self))

    monkeypatch.setattr(_Worker, "start", start_and_note)
    yield
    started.clear()


def workers():
    """Return the pids of the pool's workers."""
    found = (worker() for worker in started)
    return {worker.pid for worker in found if worker is not None and worker.exitcode is None}


def test_a_worker_killed_just_after_its_answer_does_not_hold_up_the_next(create, backend):
    executor = create()
    worker = executor.submit(stop_after_the_answer).result(DEADLINE)
    poll(lambda: psutil.Process(worker).status() == psutil.STATUS_STOPPED, "it has stopped")
    future = executor.submit(os.getpid)
    if backend == "pool":
        poll(lambda: workers() - {worker}, "the next was started")
    os.kill(worker, signal.SIGKILL)
    assert future.result(DEADLINE) != worker


def stop_after_the_answer():
    """Have this process stop when the pool has its answer, with whatever it has locked."""
    from multiprocessing.connection import Connection

    send_bytes = Connection.send_bytes

    def send_and_stop(self, *args):
        send_bytes(self, *args)
        if sys._getframe(1).f_code.co_name == "put":
            os.kill(os.getpid(), signal.SIGSTOP)

    Connection.send_bytes = send_and_stop  # type: ignore[method-assign]
    return os.getpid()


def test_a_worker_that_is_gone_before_anybody_listens_has_answered(create, backend, monkeypatch):
    submit, start = POOLS[backend].submit, _Worker.start
    submitted, started = [], []

    def start_and_note(self):
        start(self)
        started.append(self)

    def submit_and_wait(self, *args, **kwargs):
        future = submit(self, *args, **kwargs)
        submitted.append(future)
        future.result(DEADLINE)
        if backend == "pool":
            poll(lambda: len(started) > len(submitted), "the next was started")
        return future

    monkeypatch.setattr(_Worker, "start", start_and_note)
    monkeypatch.setattr(POOLS[backend], "submit", submit_and_wait)
    executor = create()
    assert [executor.submit(abs, -number).result(DEADLINE) for number in range(3)] == [0, 1, 2]
    assert len(submitted) == 3


def test_a_task_that_the_pool_forgets_is_handed_in_again(create, backend, monkeypatch):
    if backend != "pool":
        pytest.skip("loky has a lock against it")
    executor = create()
    worker = executor.submit(os.getpid).result(DEADLINE)
    (worker,) = poll(lambda: workers() - {worker}, "there is an idle worker")
    submit = POOLS[backend].submit
    forgotten: list[concurrent.futures.Future] = []

    def submit_and_forget(self, *args, **kwargs):
        # MOCK: what CPython 3.11 does of itself if it finds the worker dead in the middle of a submit.
        if forgotten:
            return submit(self, *args, **kwargs)
        os.kill(worker, signal.SIGKILL)
        forgotten.append(concurrent.futures.Future())
        return forgotten[0]

    monkeypatch.setattr(POOLS[backend], "submit", submit_and_forget)
    assert executor.submit(abs, -1).result(DEADLINE) == 1


def test_a_worker_that_cannot_answer_says_why(create):
    executor = create()
    error = executor.submit(be_unable_to_answer).exception(DEADLINE)
    assert isinstance(error, OSError)
    assert "no answer" in str(error)
    assert executor.submit(abs, -1).result(DEADLINE) == 1


def be_unable_to_answer():
    from multiprocessing.connection import Connection

    send = Connection._send_bytes  # type: ignore[attr-defined]

    def fail(self, buffer):
        if sys._getframe(2).f_code.co_name == "serve":
            raise OSError("no answer")
        send(self, buffer)

    Connection._send_bytes = fail  # type: ignore[attr-defined]


def test_workers_that_die_before_they_begin_are_an_answer_at_last(create, tmp_path):
    note = tmp_path / "note"
    error = create(initializer=note_and_exit, initargs=(note,)).submit(abs, 1).exception(DEADLINE)
    assert isinstance(error, fedexec.WorkerDiedError)
    assert error.exitcode == 3
    assert error.pid is not None
    assert 1 < len(note.read_text()) < 9


def note_and_exit(note):
    with note.open("a") as file:
        file.write("x")
    os._exit(3)


@pytest.mark.thorough
def test_descriptors_do_not_pile_up(create):
    executor = create()
    assert list(executor.map(abs, range(5))) == list(range(5))
    before = len(descriptors())
    assert list(executor.map(abs, range(20))) == list(range(20))
    for _ in range(5):
        assert executor.submit(os._exit, 3).exception(DEADLINE).exitcode == 3
    assert executor.submit(abs, -1).result(DEADLINE) == 1
    assert len(descriptors()) < before + 10


def is_full_pipe(fd):
    try:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if not stat.S_ISFIFO(os.fstat(fd).st_mode) or mode != os.O_WRONLY:
            return False
        return not select.select([], [fd], [], 0)[1]
    except OSError:  # closed meanwhile
        return False


def test_a_large_task_that_its_worker_never_read_holds_no_thread():
    pytest.importorskip("loky")

    def feeders():
        return [thread for thread in threading.enumerate() if thread.name == "QueueFeederThread"]

    with fedexec.create_executor("loky", max_workers=1) as executor:
        pid = executor.submit(os.getpid).result()
        os.kill(pid, signal.SIGSTOP)
        try:
            large = executor.submit(len, bytes(1 << 20))
            poll(lambda: any(map(is_full_pipe, descriptors())), "the pipe is full")
        finally:
            os.kill(pid, signal.SIGKILL)
        assert large.result(DEADLINE) == 1 << 20
    poll(lambda: not feeders(), "no thread writes for ever")
