"""What can be seen of Windows and macOS on Linux: names that they lack are taken away before the import."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedexec.testing.tasks import poll

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="plays other systems on Linux")

HERE = Path(__file__).parent
PRETEND = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import elsewhere
del sys.path[0]
elsewhere.pretend({{!r}})
"""
NEEDS_POSIX = "it needs Linux or macOS; on Windows use WSL2"


def run(script, *arguments, **variables):
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | variables)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


ON_WINDOWS = (
    PRETEND.format("win32")
    + """
import json
import fedexec
said = {}
for backend in ("standby", "process", "pool", "loky", "ray", "dask", None):
    try:
        fedexec.create_executor(backend)
    except fedexec.BackendUnavailableError as exc:
        said[str(backend)] = str(exc)
try:
    fedexec.create_executor("inline", device="emulated:1GiB")
except fedexec.DeviceError as exc:
    said["emulated"] = str(exc)
with fedexec.create_executor("inline", max_workers=2, initializer=int) as executor:
    results = list(executor.map(abs, range(-3, 0)))
    failure = repr(executor.submit(divmod, 1, 0).exception())
print(json.dumps([results, failure, said]))
"""
)


def test_on_windows_inline_runs_and_the_others_say_what_they_need():
    results, failure, said = json.loads(run(ON_WINDOWS))
    assert results == [3, 2, 1]
    assert failure.startswith("ZeroDivisionError")
    assert "this system cannot emulate a device" in said.pop("emulated")
    names = {"standby", "process", "pool", "loky", "ray", "dask"}
    assert {name: said.pop(name) for name in names} == {
        name: f"Backend {name!r} is not available: {NEEDS_POSIX}." for name in names
    }
    assert said == {"None": f"Backend 'process' is not available: {NEEDS_POSIX}."}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["backends"], ["backends", "--json"], ["run", "--help"]]
)
def test_on_windows_the_command_tells_what_there_is(arguments):
    script = PRETEND.format("win32") + "from fedexec._cli import main; sys.exit(main(sys.argv[1:]))"
    printed = run(script, *arguments)
    if arguments == ["backends"]:
        assert printed.count(f"not available here; {NEEDS_POSIX}") == 6
        assert "pip install" not in printed
    elif arguments == ["backends", "--json"]:
        rows = {row["name"]: row for row in json.loads(printed)}
        assert rows["inline"]["available"]
        assert not rows["standby"]["available"]
        assert rows["standby"]["reason"] == NEEDS_POSIX
        assert rows["loky"]["install"] is None
    else:
        assert "fedexec" in printed


ON_MACOS = """
import json, sys
import numpy as np
import fedexec
assert sys.platform == "darwin"
results = []
for backend in sys.argv[1:]:
    with fedexec.create_executor(backend, max_workers=2) as executor:
        tiny = [future.result(60) for future in [executor.submit(abs, -n) for n in range(3)]]
        large = executor.submit(np.negative, np.ones(10_000_000 // 8)).result(60)
        try:
            executor.submit(sys.exit, 3).result(60)
        except SystemExit as exc:
            results.append([backend, tiny, large.sum(), exc.code])
try:
    fedexec.create_executor("standby", start_method="forkserver")
except fedexec.BackendUnavailableError as exc:
    results.append(str(exc))
print(json.dumps(results))
"""


@pytest.fixture
def as_on_macos(tmp_path):
    """Variables with which every interpreter that is started has what Python has on macOS before 3.13."""
    (tmp_path / "sitecustomize.py").write_text(PRETEND.format("darwin"))
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


@pytest.mark.thorough
def test_as_on_macos_tasks_run_in_fresh_interpreters(as_on_macos):
    pytest.importorskip("loky")
    backends = ("standby", "process", "pool", "loky", "inline")
    *results, refusal = json.loads(run(ON_MACOS, *backends, **as_on_macos))
    assert results == [[backend, [0, 1, 2], -1_250_000.0, 3] for backend in backends]
    assert 'start_method="forkserver" needs os.waitid' in refusal


USES_A_MANAGER = """
import os, signal, sys
import fedexec
executor = fedexec.create_executor("process", max_workers=1)
assert executor.submit(abs, -1).result(60) == 1
for line in sys.stdin:
    if line.endswith("the Manager\\n"):
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[line.split()[0]]
        os.kill(executor._scheduler._backend._manager._process.pid, number)
        assert executor.submit(abs, -2).result(60) == 2
    elif line == "shut down\\n":
        executor.shutdown()
    print(*os.listdir(os.environ["TMPDIR"]), flush=True)
"""


@pytest.fixture
def uses_a_manager(as_on_macos):
    """A script on `process`, and its folder for temporary files, whose path is short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="t-") as temp:
        command = [sys.executable, "-c", USES_A_MANAGER]
        variables = os.environ | as_on_macos | {"TMPDIR": temp}
        with subprocess.Popen(
            command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as script:
            try:
                yield script, Path(temp)
            finally:
                script.kill()


def tell(script, line):
    """Have the script do something; return what there is in its folder afterwards."""
    script.stdin.write(line + "\n")
    script.stdin.flush()
    return script.stdout.readline().split()


def test_as_on_macos_a_managers_socket_goes_with_its_caller_and_nothing_else_does(uses_a_manager):
    script, temp = uses_a_manager
    (directory,) = tell(script, "")
    assert (temp / directory).stat().st_mode & 0o777 == 0o700
    (temp / "somebody's").mkdir()
    script.kill()
    poll(lambda: not (temp / directory).exists(), "the directory of the socket was removed", seconds=5)
    assert [path.name for path in temp.iterdir()] == ["somebody's"]


@pytest.mark.parametrize("do", ["kill", "stop"])
def test_as_on_macos_a_managers_socket_goes_with_the_manager_and_with_the_executor(uses_a_manager, do):
    script, _ = uses_a_manager
    (first,) = tell(script, "")
    (second,) = tell(script, f"{do} the Manager")
    assert first != second
    assert tell(script, "shut down") == []


WAITS_FOR_AN_END = """
import os, subprocess, sys
from fedexec._processes.leaving import has_ended
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
print(has_ended(child.pid))
child.stdin.close()
print(has_ended(child.pid, wait=True), has_ended(child.pid))
child.wait()
print(has_ended(child.pid), has_ended(child.pid, wait=True), has_ended(1), has_ended(1, wait=True))
"""


@pytest.mark.parametrize("variables", [{}, "as on macOS"])
def test_whether_a_child_has_ended_is_known_before_it_is_reaped(variables, as_on_macos):
    printed = run(WAITS_FOR_AN_END, **(as_on_macos if variables else {}))
    assert printed.split() == ["False", "True", "True", *["False"] * 4]


READS_MEMORY = """
from fedexec.memory import host
peak, resident = host.peak_and_rss()
print(peak, resident // 1_000_000 > 0, host.reset_peak())
"""


def test_as_on_macos_a_worker_knows_what_it_holds_so_that_memory_limit_is_kept(as_on_macos):
    assert run(READS_MEMORY, **as_on_macos).split() == ["None", "True", "False"]
