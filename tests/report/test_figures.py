"""The figures of README and docs are those of the committed results, and a command says when they are not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from planted import strategy, whole, write

SCRIPT = Path(__file__).parents[2] / "bench" / "figures.py"
QUOTING = ("README.md", "docs/explanation/results.md")


@pytest.fixture
def project(tmp_path):
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for script in (SCRIPT, SCRIPT.with_name("picture.py")):
        shutil.copy(script, tmp_path / "bench")
    for page in QUOTING:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(
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
    for name in (*QUOTING, "bench/results/cpu.html"):
        assert name in stale.stderr
    assert "old" in (project / "README.md").read_text(), "a check writes nothing"

    assert figures(project).returncode == 0
    readme, results = ((project / page).read_text() for page in QUOTING)
    for text in (readme, results):
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `standby` (default) |" in readme and "| Flower's engine (Ray) |" not in readme
    assert "9.62 clients/s with 2 workers" in results
    assert "[bench/results/cpu.html](https://" in results
    assert figures(project, "--check").returncode == 0

    write(project / "bench" / "results" / "cpu.json", strategy("standby", 2.0))
    assert figures(project, "--check").returncode == 1
