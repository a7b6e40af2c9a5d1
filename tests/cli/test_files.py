"""What commands leave: each path stays what it is, nothing is half, and what cannot work is said before."""

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from fedexec._bench.plan import plan
from fedexec._bench.result_file import Document
from fedexec._cli import main
from fedexec._system import files

PLANTED = Path(__file__).parents[1] / "report"


@pytest.fixture(scope="session")
def measured(tmp_path_factory):
    """Make a file of benchmarks by the tests of reports, which know how."""
    made = tmp_path_factory.mktemp("measured") / "good.json"
    code = "import sys, pathlib, planted; planted.whole(pathlib.Path(sys.argv[1]))"
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(PLANTED), *sys.path])}
    subprocess.run([sys.executable, "-c", code, made], check=True, env=environ, timeout=60)
    return made


@pytest.fixture
def report(measured, tmp_path):
    """Return a function that runs `fedexec report` on a copy of that file, in a directory of its own."""
    shutil.copy(measured, tmp_path / "good.json")

    def run(*argv, **more):
        command = [sys.executable, "-m", "fedexec", "report", "good.json", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, **more)

    return run


def test_a_link_stays_one_and_its_target_keeps_its_mode(tmp_path):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    files.write(link, b"new")
    assert link.is_symlink()
    assert (target.read_text(), stat.S_IMODE(target.stat().st_mode)) == ("new", 0o640)
    target.unlink()
    files.write(link, b"again")
    assert link.is_symlink() and target.read_text() == "again"


def test_a_new_file_has_the_mode_that_the_user_gives_new_files(tmp_path):
    (tmp_path / "theirs").touch()
    files.write(tmp_path / "ours", b"new")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_all_names_of_a_file_show_what_was_written(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("old and longer")
    other.hardlink_to(one)
    files.write(one, b"new")
    assert other.read_text() == "new"


def test_a_pipe_stays_one_and_its_reader_gets_everything(report, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        done = report("--json", "pipe")
        got, _ = reader.communicate(timeout=30)
    assert done.returncode == 0, done.stderr
    assert json.loads(got)["workloads"]
    assert (tmp_path / "pipe").is_fifo()


def test_a_device_stays_one(report, tmp_path):
    (tmp_path / "nowhere").symlink_to("/dev/null")
    before = Path("/dev/null").stat()
    done = report("--json", "nowhere", "--html", "/dev/null")
    assert done.returncode == 0, done.stderr
    assert os.path.samestat(before, Path("/dev/null").stat())
    assert (tmp_path / "nowhere").is_symlink()


def test_a_descriptor_of_the_shell_is_written_to_where_it_stands(report, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        file.write("before\n")
        file.flush()
        done = report("--json", f"/dev/fd/{file.fileno()}", pass_fds=[file.fileno()])
        assert done.returncode == 0, done.stderr
        file.seek(0, os.SEEK_END)
        file.write("after\n")
    first, *whole, last = log.read_text().splitlines()
    assert (first, last) == ("before", "after")
    assert json.loads("\n".join(whole))["workloads"]


def test_standard_output_by_its_path_is_standard_output(report):
    done = report("--json", "/dev/stdout")
    assert json.loads(done.stdout) == json.loads(report("--json", "-").stdout)


@pytest.mark.parametrize("name", ["good.json", "./good.json", "link", "hard"])
def test_an_input_is_not_overwritten(report, tmp_path, name):
    before = (tmp_path / "good.json").read_bytes()
    (tmp_path / "link").symlink_to("good.json")
    (tmp_path / "hard").hardlink_to(tmp_path / "good.json")
    done = report("--json", name)
    assert done.returncode == 2
    assert done.stderr == f"fedexec: error: --json {name} is also read: name another file\n"
    assert (tmp_path / "good.json").read_bytes() == before


def test_two_outputs_are_not_one_file(report, tmp_path):
    done = report("--json", "out", "--html", "./out")
    assert done.returncode == 2
    assert "is also what --html writes: name another file" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.flower
def test_a_certificate_is_not_overwritten_by_a_run(capsys, tmp_path):
    key = tmp_path / "key.pem"
    key.write_text("secret")
    assert main(["run", "--certificates", str(key), str(key), str(key), "--save", str(key)]) == 2
    assert "is also read" in capsys.readouterr().err
    assert key.read_text() == "secret"


@pytest.mark.flower
@pytest.mark.parametrize("name", ["config.toml", "app/pyproject.toml"])
def test_the_settings_of_an_app_are_not_overwritten(capsys, monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(Path(__file__).parents[1] / "flower" / "quickstart_app", "app")
    Path("config.toml").write_text("num-server-rounds = 1\n")
    before = Path(name).read_text()
    assert main(["simulate", "app", "--run-config", "config.toml", "--json", f"./{name}"]) == 2
    assert f"--json ./{name} is also read" in capsys.readouterr().err
    assert Path(name).read_text() == before


def test_what_is_no_file_s_name_is_no_other_file(tmp_path):
    assert not files.is_same(tmp_path, Path("x" * 5000))


def test_what_cannot_be_written_is_said_before_and_leaves_nothing(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for name in ("socket", "no/such", "x" * 300, "."):
            with pytest.raises(files.UnwritableError, match=r"(cannot be written|is a directory).*; name a"):
                files.attempt(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["socket"]


def test_trying_changes_nothing(tmp_path):
    old = tmp_path / "old"
    old.write_text("old")
    before = old.stat()
    files.attempt(old)
    files.attempt(tmp_path / "new")
    assert os.path.samestat(before, old.stat()) and before.st_mtime_ns == old.stat().st_mtime_ns
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.fixture
def document(tmp_path):
    return Document(tmp_path / "bench.json", "smoke", plan("smoke", None, ["inline"]), {})


def test_a_part_that_others_may_have_planted_is_not_followed(document, tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".bench.json.part").symlink_to("victim")
    document.write()
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / ".bench.json.part").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".bench.json.part", "bench.json", "victim"]


def test_the_bench_file_may_be_a_link(document, tmp_path):
    (tmp_path / "elsewhere.json").touch(mode=0o600)
    document.path.symlink_to("elsewhere.json")
    document.write()
    assert document.path.is_symlink()
    assert json.loads((tmp_path / "elsewhere.json").read_text())["benchmarks"] == []
    assert stat.S_IMODE((tmp_path / "elsewhere.json").stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be a second user")
def test_a_file_that_may_be_written_where_none_may_be_made_is_written_through():
    code = """
        import os, sys
        from pathlib import Path
        from fedexec._system import files
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        files.attempt(Path(sys.argv[1]))
        files.write(Path(sys.argv[1]), b"new")
    """
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        file = Path(directory, "file")
        file.write_text("old and longer")
        file.chmod(0o666)
        command = [sys.executable, "-c", textwrap.dedent(code), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert (file.read_text(), file.stat().st_uid) == ("new", os.geteuid())


def test_the_bench_file_is_no_pipe(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert main(["bench", "--smoke", "--only", "inline", "--json", str(tmp_path / "pipe")]) == 2
    assert "--json names a file, in which a run that was interrupted goes on" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


def test_one_output_that_cannot_be_written_does_not_cost_the_other(report, tmp_path):
    done = report("--html", "/dev/full", "--json", "out.json")
    assert done.returncode == 1
    says = "/dev/full cannot be written: No space left on device; free some space, or name a file elsewhere"
    assert done.stderr == f"fedexec: error: {says}\n"
    assert json.loads((tmp_path / "out.json").read_text())["workloads"]


def test_a_standard_output_that_takes_nothing_is_one_line(measured):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "fedexec", "report", measured]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "fedexec: error: standard output: No space left on device; free some space there\n"


@pytest.mark.parametrize("names", [["file"], ["file", "hard"]])
def test_a_full_disk_keeps_what_was_there(tmp_path, names):
    """On a disk of this test's own."""
    code = """
        import sys
        from pathlib import Path
        from fedexec._system import files
        file = Path("full", "file")
        files.write(file, b"old")
        for name in sys.argv[2:]:
            Path("full", name).hardlink_to(file)
        Path("full", "ballast").write_bytes(bytes(40 << 10))
        try:
            files.write(file, bytes(60 << 10))
        except files.UnwritableError as exc:
            print(exc)
        print(file.read_bytes(), sorted(path.name for path in Path("full").iterdir()))
    """
    (tmp_path / "full").mkdir()
    own = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("needs a namespace of its own")
    script = 'mount -t tmpfs -o size=64k tmpfs full && exec "$0" -c "$@"'
    command = [*own, "sh", "-c", script, sys.executable, textwrap.dedent(code), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    if "mount" in done.stderr:
        pytest.skip(done.stderr)
    says, held = done.stdout.splitlines()
    assert says == (
        "full/file cannot be written: No space left on device; free some space, or name a file elsewhere"
    )
    assert held == f"b'old' {sorted(['ballast', *names])}"
