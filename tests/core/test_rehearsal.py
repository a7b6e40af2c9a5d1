"""A call that is rehearsed leaves in memory, once, what each fresh worker would have to make again."""

import contextlib
import io
import os
import random
import re
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedexec._processes import forkserver_client
from fedexec.errors import PreloadError
from fedexec.testing.leaks import new_children
from fedexec.testing.tasks import DEADLINE, poll

pytestmark = [
    pytest.mark.thorough_but("standby"),
    pytest.mark.skipif(sys.platform != "linux", reason="nothing is forked elsewhere"),
]

CACHE = """
import os
filled = {log!r}
_data = None

def data(size=3):
    global _data
    if _data is None:
        with open(filled, "a") as file:
            file.write(f"{{os.getpid()}}\\n")
        print("loading")
        _data = list(range(size))
    return _data

def sum_of_data():
    return sum(data()), os.getpid()
"""


@pytest.fixture(params=["standby", "process", "pool"])
def create(request, create_on):
    return lambda **options: create_on(request.param, **{"max_workers": 1} | options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return a module of the user's, and a file with a line for each time that its cache was filled."""
    log = tmp_path / "filled"
    (tmp_path / "has_a_cache.py").write_text(CACHE.format(log=str(log)))
    log.touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "has_a_cache", raising=False)
    import has_a_cache  # type: ignore[import-not-found]

    return has_a_cache, log


def test_later_workers_find_what_a_rehearsal_has_left(create, cache, capfd):
    module, log = cache
    executor = create()
    assert executor.submit(module.sum_of_data).result(DEADLINE)[0] == 3
    assert executor.rehearse(module.data, size=3)
    answers = [executor.submit(module.sum_of_data).result(DEADLINE) for _ in range(4)]
    assert [total for total, _ in answers] == [3] * 4
    assert len({pid for _, pid in answers}) == 4
    assert len(log.read_text().split()) == 2  # in the first worker, and in the rehearsal
    assert capfd.readouterr().out.count("loading") <= 1  # that of the rehearsal is not shown


def test_the_same_call_is_rehearsed_once(create, cache):
    module, log = cache
    executor = create()
    assert all(executor.rehearse(module.data) for _ in range(3))
    assert len(log.read_text().split()) == 1


def kill(processes):
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):  # One ends with another.
            process.kill()


def template_of_this_worker():
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_text()
    return "alive" if "forkserver_main" in parent else "dead, or there was none"


def test_a_template_that_replaces_another_rehearses_too(create, cache, capfd):
    module, log = cache
    before = new_children()
    executor = create()
    assert executor.rehearse(module.data)
    kill(new_children(before))

    def is_filled():  # By a template that lives: a worker of the killed one may have been on its way.
        future = executor.submit(lambda: (template_of_this_worker(), __import__("has_a_cache")._data))
        return future.exception(DEADLINE) is None and future.result() == ("alive", [0, 1, 2])

    poll(is_filled, "workers inherit it again")
    assert "loading" not in capfd.readouterr().out
    assert len(log.read_text().split()) == 2


def test_a_rehearsal_that_fails_when_it_is_repeated_leaves_workers_as_they_are(create, tmp_path):
    before = new_children()
    executor = create()
    assert executor.rehearse(os.mkdir, str(tmp_path / "made"))  # There is one already, the second time.
    kill(new_children(before))

    def is_forked():
        future = executor.submit(template_of_this_worker)
        return future.exception(DEADLINE) is None and future.result() == "alive"

    poll(is_forked, "workers are forked from a template again")


def test_what_a_rehearsal_raises_is_told_and_changes_nothing(create):
    executor = create()
    with pytest.raises(PreloadError, match="ZeroDivisionError"):
        executor.rehearse(lambda: 1 / 0)
    assert executor.submit(pow, 2, 3).result(DEADLINE) == 8


def leave_a_thread():
    import threading

    threading.Thread(target=time.sleep, args=(99,), daemon=True).start()


def start_a_process():
    import subprocess

    leave_a_thread.child = subprocess.Popen(["sleep", "99"])  # type: ignore[attr-defined]


def open_a_file():
    open_a_file.file = os.fdopen(os.open(__file__, os.O_RDONLY))  # type: ignore[attr-defined]


def make_a_lock():
    import multiprocessing

    make_a_lock.lock = multiprocessing.Lock()  # type: ignore[attr-defined]


UNFIT = {
    "file": (open_a_file, "which files are read, whose position all workers would share"),
    "lock": (make_a_lock, "which memory is shared"),
    "thread": (leave_a_thread, r"1 thread\(s\)"),
    "process": (start_a_process, "leaves processes running"),
    "directory": (lambda: os.chdir("/"), "changes the working directory"),
    "hangs": (lambda: time.sleep(99), "it was not done after 5 s"),
    "ends": (lambda: os._exit(3), "it ended the process with 3"),
}


@pytest.mark.thorough_but("thread-standby", "hangs-standby", "ends-standby")
@pytest.mark.parametrize("create", ["standby"], indirect=True)  # the template is the same everywhere
@pytest.mark.parametrize("kind", UNFIT)
def test_a_rehearsal_that_makes_the_template_unfit_changes_nothing_and_says_so(create, kind, caplog):
    call, said = UNFIT[kind]
    before, here = new_children(), os.getcwd()  # noqa: PTH109
    executor = create(preload_timeout=5 if kind == "hangs" else DEADLINE)
    assert not executor.rehearse(call)
    (record,) = [each for each in caplog.records if "leaves in memory" in each.message]
    assert re.search(said, record.message)
    assert executor.submit(os.getcwd).result(DEADLINE) == here
    executor.shutdown()
    poll(lambda: not new_children(before), "nothing was left")


def test_fresh_interpreters_inherit_nothing_and_say_so(create, cache, caplog):
    module, log = cache
    executor = create(start_method="spawn")
    assert not executor.rehearse(module.data)
    assert "fresh interpreters" in caplog.text
    assert log.read_text() == ""


def test_inline_shares_its_memory_anyway(create_on, cache):
    module, _ = cache
    executor = create_on("inline")
    assert executor.rehearse(module.data)
    assert executor.submit(module.sum_of_data).result()[0] == 3


def test_loky_finds_it_in_workers_that_start_later(create_on, cache):
    module, log = cache
    executor = create_on("loky", max_workers=1)
    assert executor.rehearse(module.data)
    assert executor.submit(module.sum_of_data).result(DEADLINE)[0] == 3
    assert len(log.read_text().split()) == 1


def draw():
    return random.random()


def test_random_numbers_are_what_they_are_without_a_rehearsal(create):
    drawn = []
    for is_rehearsed in (False, True):
        executor = create(seed=7)
        if is_rehearsed:
            assert executor.rehearse(draw)
        drawn.append([executor.submit(draw).result(DEADLINE) for _ in range(3)])
        executor.shutdown()
    assert drawn[0] == drawn[1]
    executor = create()
    assert executor.rehearse(draw)
    assert len({executor.submit(draw).result(DEADLINE) for _ in range(3)}) == 3


def test_after_a_shutdown_nothing_is_rehearsed(create):
    executor = create()
    executor.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.rehearse(int)


def test_an_argument_that_cannot_be_pickled_is_refused(create):
    import threading

    with pytest.raises(TypeError, match="pickle"):
        create().rehearse(print, threading.Lock())


def use_a_bar_and_the_default_start_method():
    import multiprocessing

    import numpy as np
    from tqdm.auto import tqdm  # a subclass of the one that the lock is named after

    np.save("mapped.npy", np.ones(9))
    mapped = np.load("mapped.npy", mmap_mode="r")
    use_a_bar_and_the_default_start_method.mapped = mapped  # type: ignore[attr-defined]
    multiprocessing.get_context().get_start_method()
    multiprocessing.get_start_method()
    return sum(tqdm(range(3), disable=False, file=io.StringIO()))


def start_method_and_lock():
    import multiprocessing

    import tqdm.auto

    return multiprocessing.get_start_method(allow_none=True), hasattr(tqdm.auto.tqdm, "_lock")


def test_a_rehearsal_may_show_a_bar_map_a_file_and_use_multiprocessings_defaults(
    create, tmp_path, monkeypatch
):
    pytest.importorskip("tqdm")
    monkeypatch.chdir(tmp_path)
    executor = create(learn=False)
    before = executor.submit(start_method_and_lock).result(DEADLINE)
    assert executor.rehearse(use_a_bar_and_the_default_start_method)
    assert executor.submit(start_method_and_lock).result(DEADLINE) == before


FORGETS_THE_TRACKER = """
import os
from multiprocessing import resource_tracker

tracker = resource_tracker._resource_tracker

def forget():
    if tracker._fd is not None:
        os.close(tracker._fd)
        tracker._fd = None

os.register_at_fork(after_in_child=forget)
"""


def make_and_drop_a_lock(number):
    import multiprocessing

    with multiprocessing.get_context("spawn").Lock():
        pass


def test_a_rehearsal_may_make_locks_where_forked_processes_forget_the_resource_tracker(
    create, tmp_path, monkeypatch
):
    """As CPython 3.14.10 has them do: a template that starts a tracker of its own has a child too many."""
    (tmp_path / "forgets_the_tracker.py").write_text(FORGETS_THE_TRACKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    executor = create(preload=["forgets_the_tracker"])
    for number in range(2):  # The second is rehearsed by a child of the process that rehearsed the first.
        assert executor.rehearse(make_and_drop_a_lock, number)
        executor.submit(make_and_drop_a_lock, number).result(DEADLINE)


def test_after_a_rehearsal_that_nobody_waited_for_another_takes_place(create, cache, monkeypatch, tmp_path):
    module, log = cache
    note = tmp_path / "pid"
    executor = create(preload_timeout=20)

    def interrupt(pid, reading):
        poll(note.exists, "the rehearsal has begun")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(forkserver_client, "end_if_stopped", interrupt)
        executor.rehearse(note_and_hang, note)
    first = psutil.Process(int(note.read_text()))
    assert executor.rehearse(module.data)
    assert executor.submit(module.sum_of_data).result(DEADLINE)[0] == 3
    assert len(log.read_text().split()) == 1
    poll(lambda: not first.is_running(), "the first has ended")


def note_and_hang(note):
    part = note.with_suffix(".part")
    part.write_text(str(os.getpid()))
    part.rename(note)
    time.sleep(600)


def test_a_call_finds_the_path_that_the_caller_has_now(create, tmp_path, monkeypatch):
    executor = create()
    (tmp_path / "arrived_later.py").write_text(
        "value = []\ndef fill(): value.append(1)\ndef look(): return value\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import arrived_later  # type: ignore[import-not-found]

    assert executor.rehearse(arrived_later.fill)
    assert executor.submit(arrived_later.look).result(DEADLINE) == [1]


@pytest.mark.thorough
def test_rehearsals_each_have_their_time_when_a_template_is_replaced(create):
    executor = create(preload_timeout=2)
    for number in range(3):
        assert executor.rehearse(time.sleep, 1.0 + number / 100)
    for child in new_children():
        with contextlib.suppress(psutil.NoSuchProcess):  # A worker leaves.
            child.kill()
    assert executor.submit(pow, 2, 3).result(DEADLINE) == 8
    assert executor.submit(_is_forked).result(DEADLINE)


def _is_forked():
    import fedexec._processes.forkserver_main

    return "from fedexec._processes.forkserver_main" in " ".join(psutil.Process().cmdline()) and bool(
        fedexec._processes.forkserver_main
    )


def test_a_call_with_a_seed_leaves_the_same_each_time(create_on, cache):
    found = set()
    for _ in range(2):
        with create_on("standby", max_workers=1, seed=7) as executor:
            executor.rehearse(keep_a_random_number)
            found.add(executor.submit(kept_number).result(DEADLINE))
    assert len(found) == 1


def keep_a_random_number():
    import has_a_cache

    has_a_cache.number = random.random()


def kept_number():
    import has_a_cache

    return has_a_cache.number


def test_a_function_of_the_script_itself_is_warned_of(create, caplog):
    """It travels by value: the variables that it would fill are those of a copy."""

    def load():
        return 3

    load.__module__, load.__qualname__ = "__main__", "load"
    assert create().rehearse(load)
    (message,) = [record.message for record in caplog.records if "script itself" in record.message]
    assert message.startswith("__main__.load is defined in the script itself")
    assert message.endswith("keep these variables in a module")
