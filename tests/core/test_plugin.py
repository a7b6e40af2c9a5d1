"""A backend of a third party, in the shape in which its author ships it: the example passes the suites."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "backend-pipe"


@pytest.fixture
def installed(tmp_path):
    """Return a folder in which the example is installed, as pip would, outside of this project."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    name = f"{project['name'].replace('-', '_')}-{project['version']}"
    info = tmp_path / f"{name}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    entries = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(entries))
    for file in EXAMPLE.glob("*.py"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_the_example_is_short():
    assert len((EXAMPLE / "fedexec_pipe.py").read_text().splitlines()) < 60


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param("TestDeaths and worker_died or a_dead_worker or kill_workers", id="some"),
        pytest.param("Test", id="all", marks=pytest.mark.thorough),
    ],
)
@pytest.mark.timeout(1200)  # all suites, one test after the other: minutes, and more on a busy machine
def test_the_example_passes_the_suites(installed, chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, "test_pipe.py"]
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=installed, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
