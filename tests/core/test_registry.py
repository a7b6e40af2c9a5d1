"""Names, plug-ins, and what is imported when."""

import pathlib
import subprocess
import sys

import pytest

import fedexec
from fedexec import _registry
from fedexec.interface import Backend, Outcome, Task

PLUGIN = '''
from fedexec import Backend, Outcome

class Reversing(Backend):
    """Runs a task here and turns its result around."""

    def run(self, task):
        return Outcome(value=task.fn(*task.args)[::-1])
'''


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a distribution that plugs in "reversing", and tries to replace "inline"."""
    (tmp_path / "reversing_backend.py").write_text(PLUGIN)
    info = tmp_path / "reversing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: reversing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fedexec.backends]\n"
        "reversing = reversing_backend:Reversing\n"
        "inline = reversing_backend:Reversing\n"
        "broken = reversing_backend:Missing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("reversing_backend", None)


def test_a_plugin_is_listed_without_being_imported_and_runs_when_chosen(plugin):
    infos = {info.name: info for info in fedexec.backends()}
    assert infos["reversing"].capabilities is None
    assert infos["reversing"].available
    assert "reversing_backend" not in sys.modules
    with fedexec.create_executor("reversing") as executor:
        assert executor.submit(str.upper, "abc").result() == "CBA"


def test_a_plugin_is_found_though_the_path_has_what_import_ignores(plugin, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, pathlib.Path("/nowhere"), b"bytes", None])
    with fedexec.create_executor("reversing") as executor:
        assert executor.submit(str.upper, "abc").result() == "CBA"


def test_a_builtin_name_wins_over_a_plugin(plugin):
    assert [info.name for info in fedexec.backends()].count("inline") == 1
    with fedexec.create_executor("inline") as executor:
        assert executor.submit(str.upper, "abc").result() == "ABC"


def test_a_plugin_that_does_not_load_says_why(plugin):
    with pytest.raises(fedexec.BackendUnavailableError, match="Missing"):
        fedexec.create_executor("broken")


def test_an_unknown_name_gets_the_known_ones_and_the_nearest():
    with pytest.raises(fedexec.UnknownBackendError) as caught:
        fedexec.create_executor("lokky")
    assert caught.value.nearest == "loky"
    assert "standby, process, pool, loky, inline, ray, dask" in str(caught.value)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(fedexec.UnknownBackendError) as caught:
        fedexec.create_executor("xyzzy")
    assert "Did you mean" not in str(caught.value)


def test_a_missing_package_gets_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "loky", None)
    monkeypatch.delitem(sys.modules, "fedexec_backends.loky", raising=False)
    with pytest.raises(fedexec.BackendUnavailableError, match=r"pip install 'fedexec\[loky\]'") as caught:
        fedexec.create_executor("loky")
    assert isinstance(caught.value, ImportError)


@pytest.mark.parametrize(
    "info", [info for info in fedexec.backends() if info.available], ids=lambda info: info.name
)
def test_the_list_tells_the_promises_the_class_makes(info):
    if info.capabilities is not None:
        assert _registry.load(info.name).capabilities == info.capabilities


HEAVY = {"fedexec_backends", "fedexec.testing", "loky", "flwr", "torch", "numpy", "pytest"}
# What would make the start of an executor or of its template noticeably longer.
LATER = {"importlib.metadata", "importlib.resources", "email", "psutil", "pynvml", "difflib", "decimal"}


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import fedexec; fedexec.backends()", HEAVY),
        (
            "import fedexec; fedexec.create_executor('inline').shutdown()",
            HEAVY - {"fedexec_backends"} | LATER,
        ),
        ("import fedexec._processes.forkserver_main", HEAVY | LATER | {"fedexec.settings"}),
    ],
    ids=["the list of backends", "an executor", "a template"],
)
def test_the_core_imports_no_backend_and_nothing_heavy(code, missing):
    shown = f"import sys; print(sorted({missing!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {shown}"], capture_output=True, timeout=60, text=True
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_public_names_are_these():
    assert sorted(fedexec.__all__) == [
        "Backend", "BackendInfo", "BackendUnavailableError", "Capability", "DeviceError", "Executor",
        "FedexecError", "Future", "Hooks", "InitializerError", "Node", "NodeLostError", "Outcome",
        "PreloadError", "Settings", "SettingsError", "Stats", "Task", "TaskTimeoutError",
        "TransferError", "UnknownBackendError", "UnpickleError", "Usage", "WorkerDiedError",
        "WorkerError", "WorkerMemoryError", "backends", "create_executor", "once",
    ]  # fmt: skip
    assert all(hasattr(fedexec, name) for name in fedexec.__all__)


def test_a_backend_that_cannot_end_a_task_says_so():
    class Minimal(Backend):
        def run(self, task):
            return Outcome(value=task.fn())

    with pytest.raises(NotImplementedError, match="Minimal cannot end"):
        Minimal(fedexec.Settings(), fedexec.Hooks()).kill(Task(int, (), {}))
