"""A package of another version on the path is what tasks find, learnt or not."""

import sys

import pytest

import fedexec
from fedexec.testing.suite import AVAILABLE_START_METHODS
from fedexec.testing.tasks import DEADLINE, poll

pytestmark = pytest.mark.thorough_but("standby")


@pytest.fixture(params=["standby", "process", "pool", "loky"])
def create(request, create_on):
    return lambda **options: create_on(request.param, **{"max_workers": 1} | options)


VERSIONS = "import time\ntime.sleep(0.15)\nVERSION = {}\n"


def is_learnt(executor):
    learnt = executor.stats().learning
    return learnt["modules"] or learnt["unfit"]


def run(executor, task):
    future = executor.submit(task)
    future.result(DEADLINE)
    return future


def version_found(*, prepend=None):
    """Return a task that tells which version of a package it finds; it may look somewhere else first."""

    def task():
        if prepend is not None:
            sys.path.insert(0, prepend)
        import versioned  # type: ignore[import-not-found]

        return versioned.VERSION

    return task


@pytest.mark.parametrize("who", ["caller", "task", "caller, later"])
def test_another_version_on_the_path_is_found_learnt_or_not(create, tmp_path, monkeypatch, who):
    folders = [tmp_path / name / "site-packages" for name in ("one", "two")]
    for number, folder in enumerate(folders, 1):
        folder.mkdir(parents=True)
        (folder / "versioned.py").write_text(VERSIONS.format(number))
    one, two = map(str, folders)
    monkeypatch.syspath_prepend(one)
    executor = create()
    if who == "task":
        found = [run(executor, version_found(prepend=two)).result() for _ in range(3)]
        assert found == [2, 2, 2]
        assert not executor.stats().learning.get("modules")
        return
    if who == "caller, later":
        if fedexec.Capability.FRESH_PROCESS not in executor.capabilities:
            pytest.skip("a worker that is used again keeps what it has imported")
        if "forkserver" not in AVAILABLE_START_METHODS:
            pytest.skip("only a template learns")
        run(executor, version_found())
        poll(lambda: is_learnt(executor), "it was learnt")
        assert run(executor, version_found()).result() == 1
    monkeypatch.syspath_prepend(two)
    assert [run(executor, version_found()).result() for _ in range(3)] == [2, 2, 2]
