"""Conformance tests of imports that start processes or register exit functions before workers are forked."""

import os
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedexec.errors import PreloadError
from fedexec.interface import Capability
from fedexec.testing.leaks import living
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE, poll

__all__ = ["PreloadConformance"]

STARTS_HELPER = """
import os, pathlib, subprocess
helper = subprocess.Popen(["sh", "-c", {command!r}])
pathlib.Path({notes!r}, str(helper.pid)).touch()
{more}
"""
OBEDIENT, STUBBORN = "sleep 99", "trap '' TERM; sleep 99"

LEAVES_TO_EXIT = """
import atexit, os, pathlib, tempfile
directory = tempfile.TemporaryDirectory(dir={notes!r}, prefix="of-import-")
kept = []
pathlib.Path({notes!r}, f"imported-{{os.getpid()}}").touch()
atexit.register(lambda: pathlib.Path({notes!r}, f"exited-{{os.getpid()}}").touch())
"""


class PreloadConformance(Suite):
    """A module may start processes at import; its exit functions run in the process that imported it."""

    @pytest.fixture
    def notes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Return an empty directory; workers can import modules from its parent."""
        monkeypatch.syspath_prepend(str(tmp_path))
        (tmp_path / "notes").mkdir()
        return tmp_path / "notes"

    def test_a_process_that_a_preload_starts_ends_with_the_executor(
        self, create: Create, notes: Path
    ) -> None:
        self.need(Capability.ISOLATED)
        source = STARTS_HELPER.format(command=STUBBORN, notes=str(notes), more="")
        (notes.parent / "starts_helper.py").write_text(source)
        executor = create(preload=["starts_helper"], max_workers=1)
        assert executor.submit(pow, 2, 3).result(DEADLINE) == 8
        helpers = _processes(notes)
        assert helpers
        executor.shutdown()
        poll(lambda: not living(helpers), "the helpers have ended", seconds=2)

    def test_a_process_that_a_failing_preload_has_started_ends_too(self, create: Create, notes: Path) -> None:
        self.need(Capability.ISOLATED)
        source = STARTS_HELPER.format(command=OBEDIENT, notes=str(notes), more="1 / 0")
        (notes.parent / "starts_and_fails.py").write_text(source)
        executor = None
        # raised at once or, if each worker imports the module, by the future
        with pytest.raises(PreloadError):
            executor = create(preload=["starts_and_fails"], max_workers=1)
            executor.submit(pow, 2, 3).result(DEADLINE)
        if executor is not None:
            executor.shutdown()
        poll(lambda: not living(_processes(notes)), "the helpers have ended", seconds=2)

    def test_a_process_that_a_preload_starts_ends_with_a_killed_caller(
        self, temp: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.need(Capability.ISOLATED)
        self.need_this_machine("an engine may end the template before the template ends what it started")
        source = STARTS_HELPER.format(command=OBEDIENT, notes=str(notes), more="")
        (notes.parent / "starts_helper.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(notes.parent), prepend=os.pathsep)
        source = """
            from fedexec import create_executor

            executor = create_executor(preload=["starts_helper"])
            executor.submit(print, "ready").result()
            input()
            """
        with self.start_script(source, temp, keep_input=True) as script:
            try:
                assert script.stdout is not None
                assert script.stdout.readline() == "ready\n"
                helpers = _processes(notes)
                assert helpers
            finally:
                script.kill()
            poll(lambda: not living(helpers), "the helpers have ended", seconds=3)
            script.communicate()

    def test_what_a_preload_leaves_to_exit_is_done_once_where_it_was_imported(
        self, create: Create, notes: Path
    ) -> None:
        self.need(Capability.ISOLATED)
        (notes.parent / "leaves_to_exit.py").write_text(LEAVES_TO_EXIT.format(notes=str(notes)))
        executor = create(preload=["leaves_to_exit"])
        made = [executor.submit(_is_directory_of_import).result(DEADLINE) for _ in range(3)]
        assert made == [True] * 3  # No worker has removed the directory at its end.
        executor.shutdown()
        assert _numbers(notes, "exited") == _numbers(notes, "imported") != set()
        assert list(notes.glob("of-import-*")) == []

    def test_what_a_task_leaves_to_exit_is_done_although_a_preload_has_done_so(
        self, create: Create, notes: Path
    ) -> None:
        self.need(Capability.ISOLATED)
        (notes.parent / "leaves_to_exit.py").write_text(LEAVES_TO_EXIT.format(notes=str(notes)))
        executor = create(preload=["leaves_to_exit"], max_workers=1)
        path = executor.submit(_keep_directory, notes).result(DEADLINE)
        executor.shutdown()
        assert not path.exists()


def _processes(notes: Path) -> list[psutil.Process]:
    return [psutil.Process(int(note.name)) for note in notes.iterdir() if psutil.pid_exists(int(note.name))]


def _numbers(notes: Path, kind: str) -> set[str]:
    return {note.name.removeprefix(f"{kind}-") for note in notes.glob(f"{kind}-*")}


def _module() -> Any:
    import leaves_to_exit  # type: ignore[import-not-found]

    return leaves_to_exit


def _is_directory_of_import() -> bool:
    return Path(_module().directory.name).is_dir()


def _keep_directory(notes: Path) -> Path:
    import tempfile

    directory = tempfile.TemporaryDirectory(dir=notes, prefix="of-task-")
    _module().kept.append(directory)
    return Path(directory.name)
