"""The README's figures are those of the committed results, and a command says when they are not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from planted import strategy, whole, write

SCRIPT = Path(__file__).parents[2] / "bench" / "figures.py"


@pytest.fixture
def project(tmp_path):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    shutil.copy(SCRIPT, tmp_path / "bench")
    (tmp_path / "README.md").write_text(
        "before\n\n<!-- figures: python bench/figures.py -->\nold\n<!-- /figures -->\n\nafter\n"
    )
    whole(results / "cpu.json")
    return tmp_path


def figures(project, *argv):
    command = [sys.executable, project / "bench" / "figures.py", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_what_is_stale_is_named_and_written(project):
    stale = figures(project, "--check")
    assert stale.returncode == 1
    assert "README.md" in stale.stderr and "bench/results/cpu.html" in stale.stderr
    assert "old" in (project / "README.md").read_text(), "a check writes nothing"

    assert figures(project).returncode == 0
    text = (project / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "9.62 clients/s with 2 workers" in text
    assert "[bench/results/cpu.html](bench/results/cpu.html)" in text
    assert figures(project, "--check").returncode == 0

    write(project / "bench" / "results" / "cpu.json", strategy("standby", 2.0))
    assert figures(project, "--check").returncode == 1
