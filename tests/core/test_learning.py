"""Workers are born with the modules that earlier tasks have imported, wherever a template forks them."""

import contextlib
import importlib
import os
import random
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fedexec._channel import template_learning
from fedexec._processes.forkserver_client import Template
from fedexec.errors import WorkerDiedError
from fedexec.testing.leaks import new_children
from fedexec.testing.tasks import DEADLINE, poll

pytestmark = [
    pytest.mark.thorough_but("standby"),
    pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked elsewhere"),
]


@pytest.fixture(params=["standby", "process", "pool", "loky"])
def create(request, create_on):
    return lambda **options: create_on(request.param, **{"max_workers": 1} | options)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that writes an installed module, which notes each process that imports it."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def write(name="costly", code="", second="", folder=folder):
        log = tmp_path / f"{name}.log"
        (folder / f"{name}.py").write_text(
            "import os, time\n"
            f"with open({str(log)!r}, 'a') as file: file.write(f'{{os.getpid()}}\\n')\n"
            f"is_first = len(open({str(log)!r}).readlines()) == 1\n"
            f"time.sleep(0.15)\n{code}\n"
            f"if not is_first:\n    {second or 'pass'}\n"
        )
        return log

    return write


def importing(*names):
    """Return a task that imports modules, and returns its pid."""

    def task():
        for name in names:
            __import__(name)
        return os.getpid()

    return task


def kill(processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def is_learnt(executor):
    learnt = executor.stats().learning
    return learnt["modules"] or learnt["unfit"]


def run(executor, task):
    future = executor.submit(task)
    future.result(DEADLINE)
    return future


def test_what_a_task_imports_later_workers_are_born_with(create, package):
    log = package()
    executor = create()
    first = run(executor, importing("costly"))
    poll(lambda: is_learnt(executor), "it was learnt")
    later = [run(executor, importing("costly")) for _ in range(5)]
    assert first.usage.import_seconds > 0.15
    assert first.usage.wall_seconds >= first.usage.import_seconds
    assert all(future.usage.import_seconds < 0.1 for future in later)
    assert len(log.read_text().split()) == 2  # in the first worker and in the template
    assert executor.stats().learning["saved_seconds"] > 5 * 0.1
    assert executor.stats().learning["seconds"] > 0.15


def test_many_tasks_of_a_kind_wait_for_what_one_of_them_has_imported(create, package):
    log = package()
    executor = create(max_workers=2)
    futures = [executor.submit(importing("costly")) for _ in range(20)]
    assert all(future.result(DEADLINE) for future in futures)
    assert len(log.read_text().split()) <= 3  # two workers at first, and the template


def test_what_a_call_names_is_learnt_before_it_first_runs(create, package, monkeypatch):
    monkeypatch.setattr(template_learning, "WORTH_MODULES", 1)
    log = package("named", "def task():\n    return os.getpid()")
    monkeypatch.delitem(sys.modules, "named", raising=False)
    named = importlib.import_module("named")
    executor = create()
    assert run(executor, named.task).usage.import_seconds < 0.1
    assert len(log.read_text().split()) == 2  # here and in the template


def test_modules_of_the_users_own_are_imported_by_each_worker(create, package, tmp_path, monkeypatch):
    own = tmp_path / "project"
    own.mkdir()
    monkeypatch.syspath_prepend(str(own))
    log = package("mine", folder=own)
    executor = create()
    pids = {run(executor, importing("mine")).result() for _ in range(3)}
    assert set(log.read_text().split()) == {str(pid) for pid in pids}
    assert executor.stats().learning["modules"] == 0


def test_nothing_is_learnt_where_it_is_switched_off(create, package):
    log = package()
    executor = create(learn=False)
    pids = {run(executor, importing("costly")).result() for _ in range(3)}
    assert set(log.read_text().split()) == {str(pid) for pid in pids}
    assert executor.stats().learning == {}


def test_nothing_is_learnt_where_no_worker_is_forked(create, package):
    log = package()
    executor = create(start_method="spawn")
    run(executor, importing("costly"))
    assert len(log.read_text().split()) == 1
    assert executor.stats().learning == {}


def test_a_template_that_is_replaced_still_knows(create, package):
    log = package()
    before = new_children()
    executor = create()
    run(executor, importing("costly"))
    poll(lambda: is_learnt(executor), "it was learnt")
    kill(new_children(before))
    futures = []
    for _ in range(4):
        futures.append(executor.submit(importing("costly")))
        error = futures[-1].exception(DEADLINE)
        assert error is None or isinstance(error, WorkerDiedError)
    assert futures[-1].usage.import_seconds < 0.1
    assert len(log.read_text().split()) <= 4


LEAVES_TO_EXIT = """
import atexit, tempfile
directory = tempfile.TemporaryDirectory(dir={notes!r}, prefix="of-import-")
open({notes!r} + "/imported-%d" % os.getpid(), "w").close()
atexit.register(lambda: open({notes!r} + "/exited-%d" % os.getpid(), "w").close())
"""


@pytest.mark.parametrize("unfit", ["", "os.chdir('/')"])
def test_what_a_module_leaves_to_exit_is_done_once_where_it_was_imported(create, package, tmp_path, unfit):
    notes = tmp_path / "notes"
    notes.mkdir()
    package("leaves", LEAVES_TO_EXIT.format(notes=str(notes)), unfit)
    executor = create()
    run(executor, importing("leaves"))
    poll(lambda: is_learnt(executor), "it was learnt, or left out")
    assert run(executor, lambda: len(list(notes.glob("of-import-*")))).result() >= (0 if unfit else 1)
    run(executor, importing("leaves"))
    executor.shutdown()

    def numbers(kind):
        return {note.name.removeprefix(f"{kind}-") for note in notes.glob(f"{kind}-*")}

    assert numbers("exited") == numbers("imported") != set()
    assert list(notes.glob("of-import-*")) == []


BAD = {  # what a module does when the template tries it -> what is said of it
    "hangs": ("time.sleep(3600)", "was not done after 5 s"),
    "exits": ("os._exit(3)", "ended the process with 3"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "ended the process with -11"),
    "leaves": ("raise SystemExit(4)", "SystemExit(4)"),
    "moves": ("os.chdir('/')", "changes the working directory"),
    "chooses": ("import multiprocessing as m; m.set_start_method('spawn', force=True)", "the start method"),
    "connects": ("import socket; here = socket.socket()", "which connections are open"),
    "handles": ("import signal; signal.signal(signal.SIGUSR1, print)", "how signals are handled"),
    "threads": ("import threading; threading.Thread(target=time.sleep, args=(99,)).start()", "thread(s)"),
    "starts": ("import subprocess; child = subprocess.Popen(['sleep', '99'])", "leaves processes running"),
    "masks": ("os.umask(0o077)", "the file mode creation mask"),
    "reads": ("file = open(__file__)", "which files are read"),
    "shares": ("import multiprocessing as m; lock = m.Lock()", "which memory is shared"),
    "maps": ("import mmap; shared = mmap.mmap(-1, 4096)", "which memory is shared"),
    "blocks": (
        "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})",
        "which signals are blocked",
    ),
    "wakes": ("import signal; signal.setitimer(signal.ITIMER_VIRTUAL, 3600)", "which alarm is set"),
    "limits": ("import resource as r; r.setrlimit(r.RLIMIT_STACK, (1 << 20, -1))", "its limits"),
    "waits in forks": ("os.register_at_fork(after_in_child=lambda: time.sleep(3600))", "after 5 s"),
    "ends forks": ("os.register_at_fork(after_in_child=lambda: os._exit(7))", "ended with 7"),
    "counts": ("import decimal; decimal.getcontext().prec = 3", "the precision of decimal numbers"),
    "collects": ("import gc; gc.disable()", "how garbage is collected"),
}  # fmt: skip


@pytest.mark.thorough_but("hangs-standby", "exits-standby", "threads-standby", "counts-standby")
@pytest.mark.parametrize("create", ["standby"], indirect=True)  # the template is the same everywhere
@pytest.mark.parametrize("name", BAD)
def test_a_module_that_does_harm_when_the_template_tries_it_is_left_out_alone(create, package, name, capfd):
    code, said = BAD[name]
    package("bad", second=code)
    good = package("good")
    before, here = new_children(), Path.cwd()
    executor = create(preload_timeout=5 if said.endswith("after 5 s") else DEADLINE)
    run(executor, importing("good", "bad"))
    poll(lambda: is_learnt(executor), "it was learnt")
    report = executor.stats().learning
    assert list(report["unfit"]) == ["bad"]
    assert said in report["unfit"]["bad"]
    assert report["modules"] >= 1
    imports = len(good.read_text().split())
    assert run(executor, importing("good")).usage.import_seconds < 0.1
    assert len(good.read_text().split()) == imports
    assert run(executor, Path.cwd).result() == here
    executor.shutdown()
    poll(lambda: not new_children(before), "nothing was left")
    assert capfd.readouterr() == ("", "")


def test_a_package_that_does_harm_is_tried_once_and_not_again_for_its_modules(create, package, tmp_path):
    log = tmp_path / "tries.log"
    folder = tmp_path / "site-packages" / "harmful"
    folder.mkdir()
    note = f"with open({str(log)!r}, 'a') as file: file.write('x')"
    (folder / "__init__.py").write_text(
        f"import time\n{note}\ntime.sleep(0.15)\nimport os; os.umask(0o077)\n"
    )
    names = [f"harmful.part{number}" for number in range(4)]
    for name in names:
        (tmp_path / "site-packages" / f"{name.replace('.', '/')}.py").write_text("")
    executor = create()
    run(executor, importing(names[0]))
    poll(lambda: is_learnt(executor), "it was tried")
    assert list(executor.stats().learning["unfit"]) == ["harmful"]
    for name in names:
        run(executor, importing(name))
    executor.shutdown()
    assert log.read_text().count("x") <= 2 + 1 + len(names)  # two trials, and each worker


def test_what_a_module_prints_when_it_is_learnt_is_not_shown(create, package, capfd):
    package("loud", code="print('welcome', flush=True); os.write(2, b'hello')")
    executor = create()
    run(executor, importing("loud"))
    shown = capfd.readouterr()
    poll(lambda: is_learnt(executor), "it was learnt")
    executor.shutdown()
    assert ("welcome" in shown.out, "hello" in shown.err) == (True, True)
    assert capfd.readouterr() == ("", "")


def test_the_same_seed_draws_the_same_before_and_after_learning(create, package):
    package(code="import random; random.random()")  # as rich does

    def draw():
        import costly  # type: ignore[import-not-found]  # noqa: F401

        return random.random()

    def draws(**options):
        executor = create(seed=5, **options)
        found = []
        for _ in range(4):
            found.append(run(executor, draw).result())
            if options.get("learn", True):
                poll(lambda: is_learnt(executor), "it was learnt")
        return found

    assert draws() == draws(learn=False)


def test_a_template_killed_while_it_learns_loses_nothing(create, package):
    package(second="time.sleep(0.5)")
    before = new_children()
    executor = create(retries=5, max_workers=2)
    executor.submit(importing("costly")).result(DEADLINE)
    futures = [executor.submit(importing("costly")) for _ in range(6)]
    for _ in range(3):
        time.sleep(0.1)
        kill(new_children(before))
    assert all(isinstance(future.result(DEADLINE), int) for future in futures)
    executor.shutdown()
    poll(lambda: not new_children(before), "nothing was left")


def test_tasks_go_on_where_no_thread_starts_that_would_learn(create, package, monkeypatch):
    log = package()
    start = threading.Thread.start

    def refuse(thread):
        if thread.name == "fedexec-learning":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    executor = create()
    for _ in range(3):
        run(executor, importing("costly"))
    executor.shutdown()
    assert log.exists()
    assert executor.stats().learning["modules"] == 0


def test_tasks_do_not_wait_long_for_a_template_that_hangs_while_it_learns(create, package):
    # In the template alone: there nobody is shown what it prints.
    package(second="time.sleep(3600 if os.path.realpath('/proc/self/fd/1') == '/dev/null' else 0)")
    executor = create(max_workers=2)
    run(executor, importing("costly"))
    begun = time.monotonic()
    futures = [executor.submit(importing("costly")) for _ in range(8)]
    assert all(isinstance(future.result(DEADLINE), int) for future in futures)
    assert time.monotonic() - begun < 8


def test_a_task_that_is_late_because_it_imports_says_so(create, package):
    package("slow", code="time.sleep(3600)")
    executor = create(timeout=0.7)
    error = executor.submit(importing("slow")).exception(DEADLINE)
    assert error.is_importing
    assert "It was importing modules then" in str(error)
    error = executor.submit(time.sleep, 3600).exception(DEADLINE)
    assert not error.is_importing
    assert "importing" not in str(error)


def test_an_executor_that_ends_while_it_learns_leaves_nothing(create, package):
    package(second="time.sleep(3600)")
    before = new_children()
    executor = create()
    run(executor, importing("costly"))
    begun = time.monotonic()
    executor.shutdown()
    assert time.monotonic() - begun < 5
    poll(lambda: not new_children(before), "nothing was left")


def test_an_executor_that_ends_just_before_it_learns_leaves_nothing(create, package, monkeypatch):
    has_stopped = threading.Event()
    learn, stop = Template.learn, Template.stop

    def learn_late(template, modules):
        assert has_stopped.wait(DEADLINE)
        return learn(template, modules)

    def stop_and_tell(template):
        stop(template)
        has_stopped.set()

    monkeypatch.setattr(Template, "learn", learn_late)
    monkeypatch.setattr(Template, "stop", stop_and_tell)
    package()
    before = new_children()
    executor = create()
    run(executor, importing("costly"))
    executor.shutdown()
    assert not new_children(before)


@pytest.mark.parametrize("create", ["standby"], indirect=True)  # the channel waits, everywhere the same
def test_the_time_that_a_task_waits_for_a_lesson_is_not_its_own(create, package):
    package(second="time.sleep(0.5)")  # which the template takes
    executor = create(timeout=4)
    executor.submit(import_and_wait, 0).result(DEADLINE)
    assert executor.submit(import_and_wait, 3.6).result(DEADLINE) == "costly"
    assert executor.stats().learning["modules"]


def import_and_wait(seconds):
    import costly

    time.sleep(seconds)
    return costly.__name__
