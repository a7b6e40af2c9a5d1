"""What ``standby`` promises beyond every other backend."""

import atexit
import collections
import functools
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest

import fedexec
from fedexec.testing.leaks import new_children
from fedexec.testing.suite import AVAILABLE_START_METHODS

pytestmark = pytest.mark.skipif("forkserver" not in AVAILABLE_START_METHODS, reason="needs a template")


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"


def children():
    return list(new_children())


def template():
    return next(iter(new_children() & set(psutil.Process().children())))


@pytest.fixture
def create(create_on):
    return lambda **options: create_on(
        "standby", **{"max_workers": 2, "start_method": "forkserver"} | options
    )


def test_workers_wait_before_there_is_work(create):
    create(standby=3)
    eventually(lambda: len(children()) == 4)


def test_none_waits_if_none_shall(create):
    executor = create(standby=0)
    assert executor.submit(os.getpid).result() != os.getpid()
    eventually(lambda: len(children()) == 1)


def test_every_task_has_a_process_of_its_own(create):
    executor = create()
    pids = [future.result() for future in [executor.submit(os.getpid) for _ in range(200)]]
    assert len(set(pids)) == 200
    eventually(lambda: len(children()) == 3)


def test_a_worker_serves_as_many_tasks_as_allowed(create):
    executor = create(max_workers=1, max_tasks_per_child=3)
    assert fedexec.Capability.FRESH_PROCESS not in executor.capabilities
    pids = [executor.submit(os.getpid).result() for _ in range(9)]
    assert sorted(collections.Counter(pids).values()) == [3, 3, 3]


def leak(size):
    import test_standby

    kept = getattr(test_standby, "_kept", [])
    kept.append(bytearray(b"x" * size))
    test_standby._kept = kept  # type: ignore[attr-defined]
    return os.getpid()


def test_a_reused_worker_above_the_limit_is_replaced(create):
    # A worker is also replaced when the template has learnt something: not here.
    executor = create(max_workers=1, max_tasks_per_child=1000, memory_limit="150MiB", learn=False)
    assert fedexec.Capability.RECYCLES in executor.capabilities
    pids = [executor.submit(leak, 40 << 20).result() for _ in range(12)]
    assert 1 < len(set(pids)) < 12
    assert executor.stats().restarts["host memory"] >= len(set(pids)) - 1


def test_a_worker_that_does_not_end_is_ended(create, monkeypatch):
    from fedexec_backends import standby

    monkeypatch.setattr(standby, "LEAVE_SECONDS", 0.2)
    executor = create(max_workers=1)
    pid = executor.submit(stay).result()
    eventually(lambda: not psutil.pid_exists(pid))


def stay():
    threading.Thread(target=time.sleep, args=(3600,)).start()
    return os.getpid()


def test_workers_that_do_not_end_are_waited_for_together(create, monkeypatch):
    from fedexec_backends import standby

    monkeypatch.setattr(standby, "LEAVE_SECONDS", 2.0)
    executor = create(max_workers=1, standby=5, initializer=time.sleep, initargs=(3600,))
    eventually(lambda: len(children()) == 6)
    start = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - start < 6
    assert not children()


@pytest.mark.parametrize("how", ["kill_workers", "terminate_workers"])
def test_initializers_are_not_waited_for_when_all_workers_are_to_end(create, monkeypatch, how, capfd):
    from fedexec_backends import standby

    monkeypatch.setattr(standby, "LEAVE_SECONDS", 3600.0)
    executor = create(max_workers=1, standby=3, initializer=time.sleep, initargs=(3600,))
    future = executor.submit(int)
    eventually(lambda: len(children()) == 5)
    getattr(executor, how)()
    assert future.done()
    assert not children()
    assert capfd.readouterr() == ("", "")  # no stacks of workers that have not begun a task


def test_a_waiting_worker_that_is_stopped_is_given_no_task_however_large(create):
    executor = create(max_workers=1, shared_memory=False)
    eventually(lambda: len(children()) == 2)
    (waiting,) = template().children()
    waiting.suspend()
    assert executor.submit(len, bytes(4 << 20)).result(30) == 4 << 20
    eventually(lambda: not waiting.is_running())


# ---------------------------------------------------------------- the template


def test_what_the_warm_up_did_every_worker_has(create, modules):
    modules("warm_state", "value = None\n")
    executor = create(preload=["warm_state"], warmup=functools.partial(warm, "ready"))
    assert [executor.submit(look).result() for _ in range(3)] == ["ready"] * 3


def warm(value):
    import warm_state  # type: ignore[import-not-found]

    warm_state.value = value


def look():
    import warm_state

    return warm_state.value


def test_a_template_that_dies_is_replaced_and_what_runs_goes_on(create, tmp_path):
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError):
        pytest.skip("without a pidfd only the template can tell that a worker has ended")
    executor = create()
    gate = tmp_path / "gate"
    running = executor.submit(wait_for, str(gate))
    eventually(lambda: running.running())
    eventually(lambda: len(children()) == 4)
    template().kill()
    assert [future.result() for future in [executor.submit(abs, -i) for i in range(20)]] == list(range(20))
    gate.touch()
    assert running.result() == "done"


def wait_for(path):
    while not Path(path).exists():
        pass
    return "done"


def test_a_warm_up_that_fails_is_refused_with_the_reason(create):
    with pytest.raises(fedexec.PreloadError, match=r"(?s)test_standby.fail_to_warm.*no luck"):
        create(warmup=functools.partial(fail_to_warm, "no luck"))
    assert children() == []


def fail_to_warm(reason):
    raise ValueError(reason)


def test_a_preload_that_hangs_is_named_after_a_while(create, modules):
    modules("hangs", "import time\ntime.sleep(3600)\n")
    with pytest.raises(fedexec.PreloadError, match=r"'hangs'.*not done after 4 s"):
        create(preload=["json", "hangs"], preload_timeout=4)
    assert children() == []


def test_a_preload_that_ends_the_template_is_named(create, modules):
    modules("exits", "import os\nos._exit(3)\n")
    with pytest.raises(fedexec.PreloadError, match=r"'exits'.*died"):
        create(preload=["exits"])


def test_a_caller_killed_during_the_preload_leaves_nothing(modules, tmp_path):
    modules("slow", f"open({str(tmp_path / 'begun')!r}, 'w').close()\nimport time\ntime.sleep(3600)\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import fedexec\n"
        "fedexec.create_executor('standby', preload=['slow'], start_method='forkserver')"
    )
    caller = subprocess.Popen([sys.executable, "-c", code])
    eventually((tmp_path / "begun").exists)
    family = psutil.Process(caller.pid).children(recursive=True)
    assert family
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    _, alive = psutil.wait_procs(family, timeout=2)
    assert alive == []


def test_threads_are_shared_out_although_the_template_has_one(create):
    executor = create(max_workers=1, threads_per_worker=3)
    assert executor.submit(os.getenv, "OMP_NUM_THREADS").result() == "3"


def test_the_initializer_runs_while_the_worker_waits(create, tmp_path):
    executor = create(max_workers=1, initializer=time.sleep, initargs=(0.3,))
    usage = executor.submit(abs, 1)
    usage.result()
    assert usage.usage.setup_seconds >= 0.3
    assert usage.usage.wall_seconds < 0.3


# ---------------------------------------------------------------- what multiprocessing says in a worker


def test_a_worker_is_a_child_of_the_caller_to_multiprocessing(create):
    executor = create(max_workers=1)
    authkey = bytes(multiprocessing.current_process().authkey)
    for _ in range(2):
        found = executor.submit(look_around).result()
        default = multiprocessing.get_all_start_methods()[0]
        assert found == (os.getpid(), True, authkey, default, False, os.getpid(), sys.argv)


def look_around():
    parent, me = multiprocessing.parent_process(), multiprocessing.current_process()
    method = multiprocessing.get_start_method()
    tracker = resource_tracker._resource_tracker
    assert tracker._check_alive()  # type: ignore[attr-defined]
    assert parent is not None
    assert me.pid == os.getpid()
    return parent.pid, parent.is_alive(), bytes(me.authkey), method, me.daemon, parent.ident, sys.argv


def test_a_task_may_start_processes(create):
    assert create(max_workers=1).submit(start_processes).result() == [1, 4, 9, "over"]


def start_processes():
    with multiprocessing.Manager() as manager, multiprocessing.Pool(1) as pool:
        queue = manager.Queue()
        process = multiprocessing.Process(target=queue.put, args=("over",))
        process.start()
        process.join()
        return [*pool.map(square, [1, 2, 3]), queue.get()]


def square(number):
    return number * number


def test_what_a_task_leaves_for_the_end_is_done_at_the_end(create, tmp_path):
    executor = create(max_workers=1)
    executor.submit(leave_for_the_end, tmp_path).result()
    eventually(lambda: sorted(path.name for path in tmp_path.iterdir()) == ["atexit", "finalizer", "thread"])


def leave_for_the_end(directory):
    atexit.register((directory / "atexit").touch)
    multiprocessing.util.Finalize(None, (directory / "finalizer").touch, exitpriority=1)

    def touch_later():
        time.sleep(0.3)
        (directory / "thread").touch()

    threading.Thread(target=touch_later).start()


def test_workers_draw_different_random_numbers(create):
    executor = create(max_workers=1)
    assert len({executor.submit(draw).result() for _ in range(5)}) == 5


def draw():
    return random.random()
