"""The emulated device: PyTorch's rules, and memory that comes back with the end of a process, not before."""

import gc
import os
import select
import signal
import subprocess
import sys
import time

import jobs
import pytest

import fedexec
from fedexec.devices import device
from fedexec.devices.discovery import find_devices
from fedexec.devices.emulated import emulated_device
from fedexec.errors import DeviceError, SettingsError
from fedexec.memory.timeline import Timeline

MIB = 1 << 20
CONTEXT = 450 * MIB


@pytest.fixture
def gpu(emulate):
    return emulate()


def test_a_process_that_allocates_nothing_holds_nothing(gpu):
    assert gpu.used_bytes() == 0
    assert gpu.process_bytes() == {}
    assert gpu.total_bytes() == 24 << 30


@pytest.mark.parametrize(
    ("wanted", "reserved"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB),
        (301 * MIB, 302 * MIB),
    ],
)
def test_segments_follow_the_rules_of_torchs_allocator(gpu, wanted, reserved):
    block = gpu.allocate(wanted)
    assert gpu.held_bytes() == CONTEXT + reserved
    assert gpu.allocated_bytes() == block.size
    assert gpu.process_bytes() == {os.getpid(): CONTEXT + reserved}


def test_blocks_share_segments_and_merge_when_they_are_freed(gpu):
    blocks = [gpu.allocate(512 * 1024) for _ in range(4)]  # four in a segment of 2 MiB
    assert gpu.held_bytes() == CONTEXT + 2 * MIB
    for block in blocks[1], blocks[0], blocks[3], blocks[2]:
        block.free()
        block.free()  # twice does no harm
    assert gpu.allocated_bytes() == 0
    whole = gpu.allocate(MIB)
    again = gpu.allocate(MIB)
    assert gpu.held_bytes() == CONTEXT + 2 * MIB, "the four were not merged"
    del whole, again


def test_freed_memory_stays_in_the_cache_of_the_process(gpu):
    with gpu.allocate(100 * MIB):
        assert gpu.peak_bytes() == CONTEXT + 100 * MIB
    assert (gpu.allocated_bytes(), gpu.used_bytes()) == (0, CONTEXT + 100 * MIB)
    gpu.empty_cache()
    assert gpu.used_bytes() == CONTEXT, "the context is not for the cache to give back"
    assert gpu.peak_bytes() == CONTEXT + 100 * MIB
    gpu.reset_peak()
    assert gpu.peak_bytes() == CONTEXT


def test_a_block_that_is_collected_is_freed(gpu):
    block = gpu.allocate(MIB)
    block.itself = block  # a cycle: its end comes in the middle of anything
    del block
    gc.collect()
    assert gpu.allocated_bytes() == 0


def test_out_of_memory_names_the_device_and_leaves_what_was_there(gpu):
    block = gpu.allocate(20 << 30)
    with pytest.raises(RuntimeError, match=r"out of memory.*4\.0 GiB. EMULATED GPU 0"):
        gpu.allocate(4 << 30)
    assert gpu.allocated_bytes() == block.size
    block.free()
    gpu.allocate(22 << 30).free()  # fits once the cached blocks are given back, which it does by itself


def test_where_torch_is_loaded_its_own_error_is_raised(emulate):
    pytest.importorskip("torch", reason="needs torch")
    emulate("emulated:1GiB")
    with fedexec.create_executor("process", max_workers=1) as executor:
        assert "EMULATED" in executor.submit(jobs.take_as_torch, 2 << 30).result()


def test_an_out_of_memory_error_crosses_processes(emulate):
    emulate("emulated:1GiB")
    with fedexec.create_executor("process", max_workers=1) as executor:
        future = executor.submit(jobs.touch, 2 << 30)
        assert isinstance(future.exception(), emulated_device.DeviceMemoryError)


# ---------------------------------------------------------------- processes


@pytest.mark.parametrize("backend", ["process", "pool", "standby"])
def test_a_fresh_process_has_given_everything_back_when_its_future_is_done(emulate, backend):
    gpu = emulate()
    with fedexec.create_executor(backend, max_workers=2) as executor:
        for _ in range(5):
            uuid, used = executor.submit(jobs.hold, 100 * MIB, keep=True).result()
            assert (uuid, used) == ("EMULATED-0", CONTEXT + 100 * MIB)
            assert gpu.used_bytes() == 0


def test_a_reused_worker_keeps_its_context_and_its_cache(emulate):
    gpu = emulate()
    with fedexec.create_executor("loky", max_workers=1) as executor:
        future = executor.submit(jobs.hold, 100 * MIB)
        future.result()
        assert gpu.used_bytes() == CONTEXT + 100 * MIB
        assert future.usage is not None
        assert future.usage.end_device_bytes == future.usage.peak_device_bytes == CONTEXT + 100 * MIB
        executor.submit(jobs.hold, 100 * MIB).result()
        assert gpu.used_bytes() == CONTEXT + 100 * MIB
    assert gpu.used_bytes() == 0


@pytest.mark.parametrize("backend", ["process", "pool", "standby", "loky"])
def test_killed_workers_give_everything_back(emulate, backend):
    gpu = emulate()
    with fedexec.create_executor(backend, max_workers=1) as executor:
        for _ in range(3):
            error = executor.submit(jobs.take_and_die, 5 << 30).exception()
            assert isinstance(error, fedexec.WorkerDiedError)
            assert gpu.used_bytes() == 0


def test_a_forked_child_keeps_what_its_parent_held(gpu):
    """As on a real GPU: a context ends with the last process that has its descriptors."""
    reading, writing = os.pipe()
    middle = os.fork()
    if middle == 0:
        held = gpu.allocate(100 * MIB)
        child = os.fork()
        if child == 0:
            signal.pause()
        os.write(writing, str(child).encode())
        os._exit(0 if held else 1)
    os.waitpid(middle, 0)
    child = int(os.read(reading, 20))
    assert gpu.used_bytes() == CONTEXT + 100 * MIB
    ended = os.pidfd_open(child)
    os.kill(child, signal.SIGKILL)
    select.select([ended], [], [])
    os.close(ended)
    assert gpu.used_bytes() == 0
    os.close(reading)
    os.close(writing)


def test_a_forked_child_begins_with_nothing_of_its_own(gpu):
    held = gpu.allocate(100 * MIB)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            mine = gpu.allocate(MIB)
            right = gpu.held_bytes() == CONTEXT + 2 * MIB and gpu.used_bytes() == 2 * CONTEXT + 102 * MIB
            held.free()  # its parent's: not its to give back
            code = 0 if right and mine and gpu.used_bytes() == 2 * CONTEXT + 102 * MIB else 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert gpu.process_bytes() == {os.getpid(): CONTEXT + 100 * MIB}


def test_the_capacity_is_shared(emulate, tmp_path):
    gpu = emulate("emulated:2GiB")
    with fedexec.create_executor("process", max_workers=3) as executor:
        first = [executor.submit(jobs.hold, 400 * MIB, tmp_path) for _ in range(2)]
        while len(list(tmp_path.iterdir())) < 2:
            pass
        assert gpu.used_bytes() == 2 * (CONTEXT + 400 * MIB)
        third = executor.submit(jobs.hold, 400 * MIB)
        assert isinstance(third.exception(), emulated_device.DeviceMemoryError)
        (tmp_path / "go").touch()
        assert all(future.result()[0] == "EMULATED-0" for future in first)
    assert gpu.used_bytes() == 0


def test_nothing_of_it_is_in_any_file_system(tmp_path, emulate):
    code = (
        "import os\n"
        "from fedexec.devices import find_devices\n"
        "gpu = find_devices()[0]\n"
        "block = gpu.allocate(1 << 20)\n"
        "print(os.environ['_FEDEXEC_EMULATED_LEDGER'], flush=True)\n"
        "input()\n"
    )
    variables = os.environ | {"FEDEXEC_DEVICE": "emulated:1GiB", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    ledger = process.stdout.readline().strip()
    assert os.path.exists(ledger)  # noqa: PTH110
    assert ledger.startswith(f"/proc/{process.pid}/fd/")
    process.kill()
    process.communicate()
    assert not os.path.exists(ledger)  # noqa: PTH110
    assert not list(tmp_path.iterdir())


def test_a_process_forked_while_another_thread_allocates_does_not_wait_for_it(gpu):
    with gpu._lock:
        pid = os.fork()
        if pid == 0:
            gpu.allocate(MIB)
            os._exit(0)
    deadline = time.monotonic() + 10
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended == (pid, 0)


# ---------------------------------------------------------------- which device


@pytest.mark.parametrize(
    "spec",
    [
        "emulated:",
        "emulated:lots",
        "emulated:0x9GiB",
        "emulated:9GiB,colour=red",
        "emulated:9MiB",
        "emulated:4TiB",
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(spec):
    with pytest.raises(SettingsError):
        find_devices(spec)


def test_a_device_that_does_not_exist_is_named(monkeypatch):
    with pytest.raises(DeviceError, match="GPU-nonsense"):
        find_devices("GPU-nonsense")
    monkeypatch.setenv("FEDEXEC_DEVICE", "99")  # more than any machine has
    with pytest.raises(DeviceError, match="FEDEXEC_DEVICE"):
        fedexec.create_executor("inline")


def test_none_is_a_choice(emulate):
    emulate()
    assert find_devices("none") == ()


def test_a_ledger_whose_maker_is_gone_is_no_ledger(emulate, monkeypatch):
    emulate()
    monkeypatch.setattr(emulated_device, "_made", {})
    monkeypatch.setenv(device.LEDGER_VARIABLE, "/proc/4194303/fd/3")
    with pytest.raises(DeviceError, match="no longer exists"):
        find_devices()


def test_every_figure_carries_the_word(emulate):
    gpu = emulate("emulated:1GiB,context=100MiB")
    assert gpu.name == "EMULATED GPU 0, 1.0 GiB, context 100 MiB"
    assert gpu.uuid.startswith("EMULATED")
    assert gpu.is_emulated


def test_the_default_has_its_figures(emulate):
    assert emulate("emulated").name == "EMULATED GPU 0, 24.0 GiB, context 450 MiB"


@pytest.mark.parametrize("place", ["/dev/null", "/proc/self/fd/0"])
def test_what_is_no_ledger_is_not_taken_for_one(emulate, monkeypatch, place):
    """As when another process has the pid of the one that made the ledger, and a file in its place."""
    emulate()
    monkeypatch.setattr(emulated_device, "_made", {})
    monkeypatch.setenv(device.LEDGER_VARIABLE, place)
    with pytest.raises(DeviceError, match="no longer exists"):
        find_devices()


@pytest.mark.parametrize("backend", ["process", "standby"])
def test_a_ledger_that_goes_in_mid_run_is_unknown_and_hangs_nobody(emulate, caplog, backend):
    gpu = emulate()
    with (
        fedexec.create_executor(backend, max_workers="auto") as executor,
        Timeline(executor.devices) as timeline,
    ):
        executor.submit(jobs.touch, 1 << 20).result(30)
        os.close(int(os.environ[device.LEDGER_VARIABLE].rsplit("/", 1)[1]))
        assert timeline.mark("gone").device_bytes == {gpu.uuid: None}
        assert isinstance(executor.submit(jobs.touch, 1 << 20).exception(30), DeviceError)
        time.sleep(0.2)  # nor does the sampler's thread mind
    assert caplog.text.count("its memory cannot be measured") == 1
