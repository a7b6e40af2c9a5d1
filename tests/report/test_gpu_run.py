"""The file of `make gpu` in a report. The figures are planted: they are nobody's measurement."""

import json
from pathlib import Path

import pytest
from planted import strategy, write

from fedexec._report import UnreadableError, markdown, page, summarize, terminal
from fedexec._report.schema import GPU_KEY, SCHEMA

GIB = 1 << 30
PLANTED = {
    GPU_KEY: SCHEMA,
    "measured": "2026-01-02T03:04:05Z",
    "machine": "Planted-1.0",
    "python": "3.11.7",
    "torch": "2.14.1",
    "devices": [{"name": "Planted <GPU>", "total_bytes": 24 * GIB}],
    "results": {
        "test_memory_comes_back[pool]": {"peak_bytes": 2 * GIB, "residual_bytes": 0},
        "test_memory_comes_back[loky]": {"peak_bytes": 3 * GIB, "worker_peak_bytes": None},
        "test_auto_fills_the_gpu[pool]": {"at_once": 7, "peak_share": 0.875},
        "test_workers_that_wait": {"seconds": {"cold": 0.5, "warm": 0.002}, "idle_bytes": {"warm": GIB}},
        "test_the_job_learns": {"seconds": [0.5, 0.25]},
    },
}


def planted(path: Path, **changes) -> Path:
    path.write_text(json.dumps(PLANTED | changes))
    return path


def cells(text: str, start: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_it_stands_in_the_text_with_units(tmp_path):
    text = markdown(summarize([planted(tmp_path / "gpu.json")]))
    assert "Measured: gpu.json, Planted <GPU> (24.0 GiB), Planted-1.0, Python 3.11.7, torch 2.14.1" in text
    assert "memory comes back:" in text
    assert cells(text, "pool") == ["pool", "2.0 GiB", "0 B", "not measured"]
    assert cells(text, "loky") == ["loky", "3.0 GiB", "not measured", "not measured"]
    assert "| at once |" in text and "88 %" in text
    assert "500 ms" in text and "2.00 ms" in text and "1.0 GiB" in text
    assert "500 ms, 250 ms" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_it_fits_a_terminal(tmp_path, width):
    text = terminal(summarize([planted(tmp_path / "gpu.json")]), width)
    assert max(map(len, text.splitlines())) <= width
    for words in ("memory comes back:", "2.0 GiB", "not measured", "500 ms"):
        assert words in text


def test_it_stands_beside_a_benchmark_in_page_and_json(tmp_path):
    bench = write(tmp_path / "bench.json", strategy("inline", 2.0), strategy("standby", 2.1))
    summary = summarize([bench, planted(tmp_path / "gpu.json")])
    assert summary.problems == []
    assert [section.workload for section in summary.sections] == ["cnn"]
    assert summary.comparisons == []
    written = page(summary)
    assert "With real contexts on a GPU" in written and '<td class="figure">2.0 GiB</td>' in written
    assert "Planted &lt;GPU&gt;" in written and "Planted <GPU>" not in written
    (gpu,) = summary.as_dict()["gpus"]
    assert gpu["results"] == PLANTED["results"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({GPU_KEY: 99}, "it is of schema 99; this fedexec reads schema 1"),
        ({"results": [1]}, "was it written by `make gpu`?"),
        ({"devices": [{"name": "without a size"}]}, "'total_bytes'"),
    ],
)
def test_one_that_cannot_be_read_is_named(tmp_path, changes, says):
    path = planted(tmp_path / "gpu.json", **changes)
    with pytest.raises(UnreadableError) as caught:
        summarize([path])
    assert str(path) in str(caught.value) and says in str(caught.value)
