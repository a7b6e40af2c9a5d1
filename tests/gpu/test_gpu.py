"""Real contexts on a real GPU: what each backend holds, at its peak and afterwards."""

import collections
import json
import os
import re
import statistics
import subprocess
import sys
import time

import gpu_jobs
import pytest

import fedexec
from fedexec._workload import jobs
from fedexec.devices.discovery import find_devices
from fedexec.interface import Capability
from fedexec.memory.timeline import Timeline

MIB = 1 << 20
NOISE = 64 * MIB  # what the driver itself may take meanwhile
BACKENDS = ["process", "pool", "loky", "standby"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_comes_back_when_the_process_ends(gpu, measured, backend):
    with Timeline([gpu]) as timeline:
        with fedexec.create_executor(backend, max_workers=2, preload=["torch"], device=gpu.uuid) as executor:
            for server_round in (1, 2):
                futures = [executor.submit(gpu_jobs.hold, 512 * MIB) for _ in range(4)]
                for future in futures:
                    assert future.result()[0] == 1
                timeline.mark("round", server_round)
            fresh = Capability.FRESH_PROCESS in executor.capabilities
        timeline.mark("shutdown")
    peak = timeline.devices[gpu.uuid].peak
    left, end = timeline.residual_bytes(gpu.uuid, "round"), timeline.residual_bytes(gpu.uuid, "shutdown")
    usage = future.usage
    assert peak is not None and left is not None and end is not None and usage is not None
    measured(
        peak_bytes=peak,
        residual_bytes=left,
        end_bytes=end,
        worker_peak_bytes=usage.peak_device_bytes,
        worker_reserved_bytes=usage.peak_reserved_bytes,
    )
    assert usage.peak_allocated_bytes is not None and usage.peak_reserved_bytes is not None
    assert usage.peak_allocated_bytes >= 512 * MIB
    assert usage.peak_reserved_bytes >= usage.peak_allocated_bytes
    if usage.peak_device_bytes is not None:  # None where the driver's pids are not ours: a container
        assert usage.peak_device_bytes > usage.peak_reserved_bytes
    assert peak > 512 * MIB
    assert left <= NOISE if fresh else left > 100 * MIB
    assert end <= NOISE


@pytest.mark.parametrize("backend", BACKENDS)
def test_auto_fills_the_gpu_and_never_runs_out(gpu, measured, backend):
    total = gpu.total_bytes()
    nbytes = total // 8
    with (
        fedexec.create_executor(backend, max_workers="auto", preload=["torch"], device=gpu.uuid) as executor,
        Timeline([gpu]) as timeline,
    ):
        for future in [executor.submit(gpu_jobs.hold, nbytes, 2.0) for _ in range(20)]:
            future.result()
        (footprint,) = executor.footprints().values()
        stats = executor.stats()
    by_hand = int(0.9 * (total - timeline.baseline[gpu.uuid]) / footprint.device_bytes)
    peak = timeline.devices[gpu.uuid].peak
    measured(footprint_bytes=footprint.device_bytes, at_once=footprint.at_once, peak_share=peak / total)
    assert footprint.at_once == by_hand
    assert (stats.failed, stats.retries) == (0, 0)
    assert peak <= 0.9 * total + NOISE


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module_may_choose_its_device_at_its_top(gpu, backend, tmp_path, monkeypatch, caplog):
    assert "PYTORCH_NVML_BASED_CUDA_CHECK" not in os.environ
    (tmp_path / "client_of_mine.py").write_text(
        'import torch\nDEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    with fedexec.create_executor(backend, max_workers=1, preload=["client_of_mine"]) as executor:
        for _ in range(2):
            assert executor.submit(gpu_jobs.sum_on_device_of, "client_of_mine").result() == ("cuda", 8.0)
    assert [record.getMessage() for record in caplog.records] == []


def test_what_starts_cuda_in_a_template_gives_way_to_fresh_interpreters(gpu, measured, caplog):
    said = {}
    for warmup in (gpu_jobs.step_of_adam, gpu_jobs.multiply):
        caplog.clear()
        with fedexec.create_executor("standby", max_workers=1, warmup=warmup) as executor:
            assert executor.submit(gpu_jobs.multiply).result() == 512.0
        (record,) = caplog.records
        said[warmup.__name__] = record.getMessage()
        assert f"gpu_jobs.{warmup.__name__}" in said[warmup.__name__]
    measured(**said)


def test_out_of_memory_is_torchs_own_error_and_the_next_task_runs(gpu):
    with fedexec.create_executor("standby", max_workers=1, preload=["torch"], device=gpu.uuid) as executor:
        error = executor.submit(gpu_jobs.hold, 2 * gpu.total_bytes()).exception()
        assert type(error).__name__ == "OutOfMemoryError"
        assert executor.submit(gpu_jobs.multiply).result() == 512.0


def test_workers_that_wait_with_a_context_answer_sooner_and_cost_memory(gpu, measured):
    seconds, held = {}, {}
    for name, initializer in (("cold", None), ("warm", jobs.start_device)):
        with (
            Timeline([gpu]) as timeline,
            fedexec.create_executor(
                "standby", max_workers=1, preload=["torch"], initializer=initializer, device=gpu.uuid
            ) as executor,
        ):
            times = []
            for _ in range(5):
                time.sleep(3)  # let the next worker get ready: that is what is compared
                started = time.perf_counter()
                executor.submit(gpu_jobs.multiply).result()
                times.append(time.perf_counter() - started)
            time.sleep(3)
            idle = timeline.mark("idle").device_bytes[gpu.uuid]
            assert idle is not None
            held[name] = idle
        seconds[name] = statistics.median(times)
    measured(seconds=seconds, idle_bytes=held)
    assert seconds["warm"] < seconds["cold"]
    assert held["cold"] <= NOISE < held["warm"]


def test_two_gpus_share_the_work(measured):
    found = find_devices()
    if len(found) < 2:
        pytest.skip("needs two GPUs")
    both = f"{found[0].uuid},{found[1].uuid}"  # where there are more, any of them could be chosen
    with fedexec.create_executor("standby", max_workers=2, preload=["torch"], device=both) as executor:
        seen = [future.result() for future in [executor.submit(gpu_jobs.hold, 64 * MIB) for _ in range(8)]]
    assert {count for count, _ in seen} == {1}, "a worker sees one device"
    counts = collections.Counter(uuid for _, uuid in seen)
    measured(tasks=dict(counts))
    assert set(counts) == {found[0].uuid, found[1].uuid}


def test_calibration_gives_a_device_that_can_be_emulated(measured):
    command = [sys.executable, "-m", "fedexec", "probe", "--calibrate"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    spec = done.stdout.strip()
    measured(spec=spec)
    assert re.fullmatch(r"emulated:\d+MiB,context=\d+MiB", spec)
    (emulated,) = find_devices(spec)
    assert emulated.is_emulated


@pytest.mark.flower
def test_the_job_learns_and_leaves_nothing(tmp_path, measured):
    file = tmp_path / "run.json"
    command = [sys.executable, "-m", "fedexec", "run", "--quiet", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    memory = next(iter(result["memory"]["devices"].values()))
    measured(seconds=[each["seconds"] for each in result["rounds"]], peak_bytes=memory["peak_bytes"])
    assert result["rounds"][-1]["metrics"]["accuracy"] >= 0.9
    for mark in result["memory"]["marks"]:
        assert max(mark["device_bytes"].values()) <= NOISE
