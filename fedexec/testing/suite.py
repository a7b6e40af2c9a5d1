"""The base of the suites: selects the backend, makes executors, and runs scripts."""

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from fedexec import _registry
from fedexec.create import create_executor
from fedexec.errors import BackendUnavailableError
from fedexec.executor import Executor
from fedexec.interface import Capability
from fedexec.testing import refusals
from fedexec.testing.leaks import new_children
from fedexec.testing.tasks import DEADLINE, Gate

__all__ = ["AVAILABLE_START_METHODS", "Create", "Suite"]

#: How workers can start here: a template needs os.waitid, which Python has not on macOS before 3.13.
AVAILABLE_START_METHODS = ("forkserver", "spawn") if hasattr(os, "waitid") else ("spawn",)

Create = Callable[..., Executor]


class Suite:
    """Base of the suites.

    Attributes
    ----------
    backend : str
        Name of the backend under test, as for :func:`fedexec.create_executor`.
    start_method : str
        Start method of its workers. Default "forkserver", where the system allows it, else "spawn".
    settings : mapping of str to object
        Further settings of all executors, such as the address of a cluster.
    """

    backend: ClassVar[str]
    settings: ClassVar[Mapping[str, object]] = {}
    start_method: ClassVar[str] = AVAILABLE_START_METHODS[0]

    # ------------------------------------------------------------ promises

    @classmethod
    def promises(cls, capability: Capability) -> bool:
        """Return whether the backend promises all of `capability`."""
        return capability in _registry.load(cls.backend).capabilities

    def need(self, capability: Capability) -> None:
        """Skip the test if the backend does not promise `capability`."""
        if not self.promises(capability):
            pytest.skip(f"backend {self.backend!r} does not promise {capability.name}")

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _available(cls) -> None:
        try:
            _registry.load(cls.backend)
        except BackendUnavailableError as exc:
            pytest.skip(str(exc))

    # ------------------------------------------------------------ executors

    @pytest.fixture(autouse=True)
    def _bare_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in os.environ:
            if name.startswith("FEDEXEC_"):
                monkeypatch.delenv(name)

    @classmethod
    def new_executor(cls, **options: Any) -> Executor:
        """Make an executor with this backend; by default it has two workers."""
        defaults: dict[str, Any] = {"max_workers": 2, "start_method": cls.start_method, **cls.settings}
        return create_executor(cls.backend, **defaults | options)

    _shared: ClassVar[Executor | None] = None

    @pytest.fixture
    def executor(self) -> Executor:
        """Return an executor that the tests of the class share, so no test may break it."""
        cls = type(self)
        if cls._shared is None:
            cls._shared = cls.new_executor()
        return cls._shared

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _end_shared_at_last(cls) -> Iterator[None]:
        yield
        cls._end_shared()

    @classmethod
    def _end_shared(cls) -> None:
        if cls._shared is not None:
            cls._shared.shutdown()
            cls._shared = None

    def alone(self) -> set[psutil.Process]:
        """End the shared executor, which might replace its workers; return the remaining children."""
        self._end_shared()
        return new_children()

    @pytest.fixture
    def create(self) -> Iterator[Create]:
        """Return a function that makes an executor for this test only."""
        made: list[Executor] = []

        def make(**options: Any) -> Executor:
            made.append(self.new_executor(**options))
            return made[-1]

        yield make
        for executor in made:
            executor.kill_workers()

    def need_this_machine(self, why: str) -> None:
        """Skip the test if tasks run on other machines, with the reason why it then shows nothing."""
        if self.promises(Capability.REMOTE):
            pytest.skip(f"backend {self.backend!r} runs tasks on other machines: {why}")

    # ------------------------------------------------------------ gates, directories, scripts

    @pytest.fixture
    def gate(self, tmp_path: Path) -> Iterator[Gate]:
        """Return a gate at which tasks wait; it is opened at the end of the test."""
        directory = tmp_path / "gate"
        directory.mkdir()
        gate = Gate(directory)
        yield gate
        gate.open()

    @pytest.fixture
    def temp(self) -> Iterator[Path]:
        """Return a directory for ``TMPDIR``; its path is short, because sockets are created there."""
        with tempfile.TemporaryDirectory(prefix="t-") as name:
            yield Path(name)

    def start_script(
        self,
        source: str,
        temp: Path,
        *args: object,
        keep_input: bool = False,
        start_new_session: bool = False,
    ) -> subprocess.Popen[str]:
        """Start `source` as a script whose executors use this backend."""
        home = Path(tempfile.mkdtemp(dir=temp))
        (home / "tmp").mkdir()
        script = home / "script.py"
        source = textwrap.dedent(source)
        if start_new_session:  # for Ctrl+C: a shell lets background jobs (this one) ignore SIGINT
            source = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n" + source
        script.write_text(source)
        variables = {
            "FEDEXEC_BACKEND": self.backend,
            "FEDEXEC_START_METHOD": self.start_method,
            "FEDEXEC_MAX_WORKERS": "2",
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(home / "tmp"),
            **{f"FEDEXEC_{name.upper()}": str(value) for name, value in self.settings.items()},
        }
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, args)],
            env=os.environ | variables,
            stdin=subprocess.PIPE if keep_input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=start_new_session,
        )

    def run_script(self, source: str, temp: Path, *args: object) -> tuple[list[str], str, int]:
        """Run a script to its end; return its lines of output, its stderr and its exit code."""
        with self.start_script(source, temp, *args) as script:
            try:
                out, err = script.communicate(timeout=DEADLINE)
            except BaseException:
                script.kill()
                raise
        return out.splitlines(), refusals.without_warnings(err), script.returncode
