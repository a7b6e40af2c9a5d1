"""What workers allocate lies in huge pages of their own, wherever the template has freed something before."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fedexec.testing.suite import AVAILABLE_START_METHODS
from fedexec.testing.tasks import DEADLINE

PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

pytestmark = [
    pytest.mark.thorough_but("standby"),
    pytest.mark.skipif(
        not PAGES.exists() or "[never]" in PAGES.read_text() or "forkserver" not in AVAILABLE_START_METHODS,
        reason="needs transparent huge pages, and a template",
    ),
]

LEAVES_GAPS = """
blocks = [bytes(size) for size in range(600, 30_000, 3)] + [bytes(20 << 20)]
blocks = blocks[::2]
"""


def faults_of_allocating(blocks, size):
    """Return the page faults of allocating so much, every byte written to."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [b"." * size for _ in range(blocks)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before + 0 * len(kept)


def resident_after_allocating(blocks, size):
    kept = [b"." * size for _ in range(blocks)]
    del kept
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


@pytest.fixture(params=["standby", "process", "pool"])
def create(request, create_on):
    return lambda **options: create_on(
        request.param, **{"max_workers": 1, "start_method": "forkserver"} | options
    )


@pytest.mark.parametrize("size", [5_000, 100_000, 1_000_000])
def test_a_worker_finds_room_in_huge_pages(create, size, tmp_path, monkeypatch):
    (tmp_path / "leaves_gaps.py").write_text(LEAVES_GAPS)
    monkeypatch.syspath_prepend(str(tmp_path))
    executor = create(preload=["leaves_gaps"])
    executor.submit(faults_of_allocating, 1, 1).result(DEADLINE)
    pages = 20_000_000 // resource.getpagesize()
    faults = executor.submit(faults_of_allocating, 20_000_000 // size, size).result(DEADLINE)
    assert faults < pages / 10


def test_a_worker_gives_back_what_a_task_has_freed(create_on):
    executor = create_on("standby", max_workers=1, max_tasks_per_child=10)
    before = executor.submit(resident_after_allocating, 1, 1).result(DEADLINE)
    after = executor.submit(resident_after_allocating, 400, 1_000_000).result(DEADLINE)
    assert after < before + 200_000_000


def test_no_room_is_no_error(tmp_path):
    """Where the address space is short, or the C library's allocator is not in use, a worker is as it was."""
    script = """
import resource
from fedexec._processes import huge_pages

limit = 64 << 20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for _ in range(3):
    huge_pages.make_room()
print(len([bytearray(1000) for _ in range(1000)]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr) == ("1000\n", "")
