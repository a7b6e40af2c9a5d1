"""Cores and memory of a container: control groups as a planted tree of files, and once for real."""

import os
import subprocess
import sys

import pytest

from fedexec._channel import segments
from fedexec._channel.messages import Delivery
from fedexec._channel.segment_pool import SegmentPool
from fedexec._system import available_resources
from fedexec.errors import TransferError
from fedexec.settings import resolve
from fedexec.testing.refusals import without_warnings

MIB = 1 << 20
BOTH = "cpu,cpuacct/a"
V1, V1_USED = "memory/a/memory.limit_in_bytes", "memory/a/memory.usage_in_bytes"
V1_STATISTICS = "memory/a/memory.stat"
MAX, USED = "memory.max", "memory.current"


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Return a function that writes the files of control groups, and makes them this process's."""
    monkeypatch.setattr(available_resources, "_affinity", lambda: 8)
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)

    def write(membership, mounts="", **files):
        for path, text in files.items():
            file = tmp_path / "top" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tmp_path / "membership").write_text(membership)
        (tmp_path / "mounts").write_text(mounts.format(here=tmp_path / "top"))
        monkeypatch.setattr(available_resources, "MOUNTS", str(tmp_path / "mounts"))
        monkeypatch.setattr(available_resources, "TOP", str(tmp_path / "top"))
        monkeypatch.setattr(available_resources, "MEMBERSHIP", str(tmp_path / "membership"))

    return write


@pytest.mark.parametrize(
    ("membership", "files", "cores"),
    [
        ("0::/", {"cpu.max": "100000 100000"}, 1),
        ("0::/", {"cpu.max": "250000 100000"}, 3),
        ("0::/", {"cpu.max": "1000 100000"}, 1),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "9900000 100000"}, 8),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 100000"}, 2),
        ("0::/../../not/seen", {"cpu.max": "200000 100000"}, 2),
        (
            "4:cpu,cpuacct:/a",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "150000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("4:cpu:/a", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("4:cpu:/docker/1\n0::/", {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("garbage", {"cpu.max": "garbage"}, 8),
        ("0::/", {"cpu.max": "1 0"}, 8),
        ("0::/", {"cpu.max": ""}, 8),
    ],
)
def test_a_quota_bounds_the_cores(plant, membership, files, cores):
    plant(membership, **files)
    assert available_resources.available_cores() == cores
    assert resolve(environ={}).max_workers == cores


@pytest.mark.parametrize(
    ("membership", "files", "total", "available"),
    [
        (
            "0::/",
            {MAX: 600, USED: 500, "memory.stat": "inactive_file 1048576"},
            600,
            101,
        ),
        (
            "0::/a",
            {"a/memory.max": 900, "a/memory.current": 0, MAX: 500, USED: 450},
            500,
            50,
        ),
        ("0::/", {MAX: 600, USED: 700}, 600, 0),
        ("5:memory:/a", {V1: 600, V1_USED: 500, V1_STATISTICS: "x 1\ntotal_inactive_file 1048576"}, 600, 101),
    ],
)
def test_a_limit_bounds_the_memory(plant, membership, files, total, available):
    plant(membership, **{name: str(n * MIB) if isinstance(n, int) else n for name, n in files.items()})
    assert available_resources.total_bytes() == total * MIB
    assert available_resources.available_bytes() == available * MIB


def mounted(root, place, kind="cgroup2", options="rw"):
    place = f"{{here}}/{place}".rstrip("/")
    return f"35 31 0:32 {root} {place} rw,relatime shared:1 - {kind} cgroup {options}\n"


V2_OF_CONTAINER = mounted("/docker/1", "")
ELSEWHERE = mounted("/", "a\\040place")


@pytest.mark.parametrize(
    ("membership", "mounts", "group"),
    [
        ("0::/docker/1/sub", V2_OF_CONTAINER, "sub"),
        ("0::/docker/1/sub/deeper", V2_OF_CONTAINER, "sub"),
        ("0::/docker/1", V2_OF_CONTAINER, "."),
        ("0::/a", ELSEWHERE, "a place/a"),
        ("0::/../1/sub", mounted("/../1", "elsewhere"), "elsewhere/sub"),
        ("0::/sub", mounted("/..", "elsewhere"), "elsewhere"),
    ],
)
def test_a_group_is_found_where_it_is_mounted(plant, membership, mounts, group):
    limits = {MAX: f"{600 * MIB}", USED: f"{500 * MIB}", "cpu.max": "100000 100000"}
    plant(membership, mounts, **{f"{group}/{name}": text for name, text in limits.items()})
    assert available_resources.available_cores() == 1
    assert available_resources.total_bytes() == 600 * MIB
    assert available_resources.available_bytes() == 100 * MIB


@pytest.mark.parametrize(
    ("root", "place", "group"),
    [
        ("/docker/1", "cpu,cpuacct", "sub"),  # as Docker mounts it
        ("/docker/1", "cpuacct,cpu", "sub"),
        ("/", "elsewhere", "docker/1"),
        ("/docker", "elsewhere", "."),
    ],
)
def test_a_group_of_version_1_is_found_where_it_is_mounted(plant, root, place, group):
    membership = "4:cpu,cpuacct:/docker/1/sub\n3:memory:/\n0::/\n"
    mounts = mounted("/", "memory", "cgroup", "rw,memory") + mounted(root, place, "cgroup", "rw,cpu,cpuacct")
    quota = {"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000"}
    plant(membership, mounts, **{f"{place}/{group}/{name}": text for name, text in quota.items()})
    assert available_resources.available_cores() == 2


@pytest.mark.parametrize(
    ("membership", "mounts", "group"),
    [
        ("0::/docker/1", mounted("/docker/2", "elsewhere"), "elsewhere"),  # of another container
        ("0::/docker/1/sub", V2_OF_CONTAINER, "docker/1"),  # of a container in this one
        ("0::/../../a", mounted("/..", "elsewhere"), "elsewhere"),  # not above ours
        ("0::/docker/1", mounted("/", "elsewhere", "cgroup", "rw,cpu,memory"), "elsewhere/docker/1"),
        ("0::/docker/1", mounted("/", "elsewhere", "ext4"), "elsewhere"),
        ("0::/docker/1", "35 31 - cgroup2 cgroup rw\n\nx", "elsewhere"),
    ],
)
def test_a_group_that_is_not_ours_bounds_nothing(plant, membership, mounts, group):
    limits = {MAX: f"{600 * MIB}", USED: f"{500 * MIB}", "cpu.max": "100000 100000"}
    plant(membership, mounts, **{f"{group}/{name}": text for name, text in limits.items()})
    assert available_resources.available_cores() == 8
    assert available_resources.total_bytes() > 600 * MIB


@pytest.mark.parametrize("text", ["max", "9223372036854771712", "garbage", ""])
def test_no_limit_bounds_nothing(plant, text):
    plant("0::/", **{"memory.max": text, "memory.current": "0", "memory.limit_in_bytes": text})
    assert available_resources.total_bytes() > 900 * MIB


@pytest.mark.skipif(not segments.supported(), reason="memory cannot be shared here")
def test_what_does_not_fit_into_a_container_is_not_sent(plant):
    np = pytest.importorskip("numpy")
    plant("0::/", **{"memory.max": f"{600 * MIB}", "memory.current": f"{590 * MIB}"})
    pool = SegmentPool()
    with pytest.raises(TransferError, match=r"20.0 MiB of arrays do not fit into memory: 10.0 MiB are free"):
        pool.parcel(np.zeros(20 * MIB, np.uint8))
    pool.close()


def test_what_does_not_fit_is_not_sent_in_a_message_either(plant):
    np = pytest.importorskip("numpy")
    pool = SegmentPool(enabled=False)
    with pool.parcel(0) as parcel:
        plant("0::/", **{"memory.max": f"{600 * MIB}", "memory.current": f"{590 * MIB}"})
        with pytest.raises(TransferError, match=r"20.0 MiB of arrays do not fit"):
            Delivery(parcel.message).answer(np.zeros(20 * MIB, np.uint8))
    with pytest.raises(TransferError, match=r"20.0 MiB of arrays do not fit"):
        pool.parcel(np.zeros(20 * MIB, np.uint8))
    pool.close()


def test_a_container_is_seen_for_real(tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000")
    code = "import fedexec._system.available_resources as m; print(m.available_cores())"
    script = f"mount --bind {tmp_path} /sys/fs/cgroup && {sys.executable} -c '{code}'"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False)
    if done.returncode != 0 and "Traceback" not in done.stderr:
        pytest.skip(f"needs a mount namespace of its own: {done.stderr.strip()}")
    assert done.stdout == "1\n"


NEEDS_MANY = """
import resource, time
import fedexec
resource.setrlimit(resource.RLIMIT_NOFILE, (64, {hard}))
with fedexec.create_executor("{backend}", max_workers=24) as executor:
    print(sum(executor.map(abs, range(48))), flush=True)
"""


def run_with_limit(backend, hard):
    script = NEEDS_MANY.format(backend=backend, hard=hard)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


@pytest.mark.thorough_but("standby", "inline")
@pytest.mark.parametrize("backend", ["standby", "process", "pool", "loky", "inline"])
def test_the_soft_limit_of_open_files_is_raised_for_many_workers(backend):
    done = run_with_limit(backend, 4096)
    assert (done.stdout.split(), without_warnings(done.stderr)) == (["1128"], "")


def test_what_exceeds_the_hard_limit_of_open_files_is_refused_at_the_start():
    done = run_with_limit("pool", 300)
    assert done.returncode == 1
    assert "max_workers=24 needs up to 608 file descriptors on backend 'pool'" in done.stderr
    assert "this process may have 300 (ulimit -Hn)" in done.stderr


def test_the_machines_memory_is_what_psutil_says():
    psutil = pytest.importorskip("psutil")
    total, available = available_resources._memory()
    assert total == psutil.virtual_memory().total
    assert available == pytest.approx(psutil.virtual_memory().available, rel=0.2)
