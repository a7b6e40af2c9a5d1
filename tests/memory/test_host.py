"""Figures of the host and of torch's allocator (played here), against what the kernel says itself."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from fedexec.memory import allocator, host

MIB = 1 << 20

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs /proc")


def rollup(pid, field):
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


@pytest.fixture
def child():
    """A process with a child of its own; each holds 100 MiB."""
    hold = "data = bytearray(b'x') * (100 << 20)"
    inner = f"{hold}; print('ready', flush=True); input()"
    code = (
        f"import subprocess, sys\n{hold}\n"
        f"command = [sys.executable, '-c', {inner!r}]\n"
        "p = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "p.stdout.readline()\n"
        "print(p.pid, flush=True)\n"
        "input()\n"
        "p.kill(); p.wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    yield process.pid, grandchild
    process.communicate(b"\n")


def test_figures_agree_with_the_kernels(child):
    for pid in child:
        assert host.pss_bytes(pid) == pytest.approx(rollup(pid, "Pss"), rel=0.02)
        assert host.rss_bytes(pid) == pytest.approx(rollup(pid, "Rss"), rel=0.02)
        assert (host.pss_bytes(pid) or 0) > 100 * MIB


def test_a_tree_is_the_sum_of_its_processes(child):
    top, below = child
    assert host.tree_bytes(root=top) == pytest.approx(rollup(top, "Pss") + rollup(below, "Pss"), rel=0.02)
    both = rollup(top, "Rss") + rollup(below, "Rss")
    assert host.tree_bytes(host.rss_bytes, root=top) == pytest.approx(both, rel=0.02)


def test_a_kernel_without_a_roll_up_is_asked_for_each_mapping(child, monkeypatch):
    read_text = Path.read_text

    def refuse(path, *arguments, **options):
        if path.name == "smaps_rollup":
            raise FileNotFoundError(path)
        return read_text(path, *arguments, **options)

    expected = rollup(child[0], "Pss")
    monkeypatch.setattr(Path, "read_text", refuse)
    assert host.pss_bytes(child[0]) == pytest.approx(expected, rel=0.02)


def test_a_process_that_is_gone_is_unknown():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert host.rss_bytes(gone.pid) is None
    assert host.pss_bytes(gone.pid) is None
    assert host.tree_bytes(root=gone.pid) is None


def test_a_peak_begins_anew():
    data = bytearray(b"x") * (200 * MIB)
    high, _ = host.peak_and_rss()
    del data
    assert host.reset_peak()
    peak, now = host.peak_and_rss()
    assert high is not None and peak is not None
    assert peak < high - 150 * MIB
    assert now == pytest.approx(host.rss_bytes(os.getpid()), rel=0.02)


def test_the_machine_is_not_larger_than_it_is():
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    assert 0 < host.available_bytes() <= host.total_bytes() <= int(fields["MemTotal"].split()[0]) * 1024


# ---------------------------------------------------------------- torch's allocator


def play(monkeypatch, **figures):
    cuda = types.SimpleNamespace(**{name: lambda value=value: value for name, value in figures.items()})
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    return cuda


FIGURES = {
    "memory_allocated": 1, "memory_reserved": 2, "max_memory_allocated": 3, "max_memory_reserved": 4,
}  # fmt: skip


def test_a_device_that_was_started_is_read(monkeypatch):
    play(monkeypatch, is_initialized=True, **FIGURES)
    assert allocator.read() == allocator.AllocatorReading(1, 2, 3, 4)


def test_a_device_that_was_not_started_is_unknown(monkeypatch):
    play(monkeypatch, is_initialized=False, **FIGURES)
    assert allocator.read() is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert allocator.read() is None


def test_a_backend_that_does_not_count_is_unknown(monkeypatch):
    play(monkeypatch, is_initialized=True)
    allocator.reset_peak()
    assert allocator.read() is None


def test_peaks_begin_anew(monkeypatch):
    called = []
    cuda = play(monkeypatch, is_initialized=True, **FIGURES)
    cuda.reset_peak_memory_stats = lambda: called.append(1)
    allocator.reset_peak()
    assert called == [1]
