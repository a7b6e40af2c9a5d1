import os
import time

import jobs
import pytest

import fedexec
from fedexec.devices.device import Device
from fedexec.interface import Capability
from fedexec.memory import host
from fedexec.memory.timeline import MOST_POINTS, Series, Timeline

MIB, GIB = 1 << 20, 1 << 30
CONTEXT = 450 * MIB
BACKENDS = ("process", "pool", "loky", "standby")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tutorials_picture(emulate, backend):
    """Between rounds device memory falls to zero where processes end, and stays where they do not."""
    gpu = emulate()
    with fedexec.create_executor(backend, max_workers=2) as executor, Timeline(executor.devices) as timeline:
        for server_round in (1, 2):
            list(executor.map(jobs.touch, [100 * MIB] * 4))
            timeline.mark("round", server_round)
        fresh = Capability.FRESH_PROCESS in executor.capabilities
        executor.shutdown()
        timeline.mark("shutdown")
    left, most = timeline.residual_bytes(gpu.uuid, "round"), timeline.devices[gpu.uuid].peak
    assert left is not None and most is not None
    assert left == 0 if fresh else CONTEXT + 100 * MIB <= left <= 2 * (CONTEXT + 100 * MIB)
    assert timeline.residual_bytes(gpu.uuid, "shutdown") == 0
    assert CONTEXT + 100 * MIB <= most <= 2 * (CONTEXT + 100 * MIB)


def test_what_others_held_before_is_no_part_of_it(emulate):
    gpu = emulate()
    with gpu.allocate(GIB), Timeline([gpu]) as timeline:
        gpu.allocate(GIB).free()
        mark = timeline.mark("round", 1)
    assert timeline.baseline == {gpu.uuid: GIB + CONTEXT}
    assert mark.device_bytes == {gpu.uuid: GIB}


def test_the_host_figure_is_that_of_all_processes():
    if host.pss_bytes(os.getpid()) is None:
        pytest.skip("the system does not say which part of a process's memory counts for it")
    with fedexec.create_executor("process", max_workers=1) as executor, Timeline() as timeline:
        before = timeline.mark("before").host_bytes
        running = executor.submit(jobs.use_host, 600 * MIB, 2.0)
        while not (tasks := executor.running()) or tasks[0].pid is None:
            time.sleep(0.01)
        while (host.rss_bytes(tasks[0].pid) or 0) < 600 * MIB and not running.done():
            time.sleep(0.01)
        # Less than all of it: what this process shares with others by then counts less in it.
        during = timeline.mark("during").host_bytes
        assert before is not None and during is not None
        assert during > before + 500 * MIB
        running.result()
    assert (timeline.host.peak or 0) >= before + 500 * MIB


class SilentDevice(Device):
    uuid, name = "GPU-silent", "a device whose driver has gone"

    def total_bytes(self):
        return None

    def used_bytes(self):
        return None

    def process_bytes(self):
        return None


def test_what_was_not_measured_is_none():
    with Timeline([SilentDevice()]) as timeline:
        mark = timeline.mark("round", 1)
    assert mark.device_bytes == {"GPU-silent": None}
    assert timeline.residual_bytes("GPU-silent", "round") is None
    assert timeline.residual_bytes("GPU-silent", "no such mark") is None
    assert timeline.devices["GPU-silent"].peak is None
    assert timeline.as_dict()["devices"]["GPU-silent"]["baseline_bytes"] is None


def test_a_long_series_stays_short_and_keeps_its_peaks():
    series = Series()
    for second in range(100_000):
        series.add(float(second), 1000 if second in (7, 54_321) else 1)
    assert MOST_POINTS // 2 <= len(series.seconds) < MOST_POINTS
    assert len(series.nbytes) == len(series.seconds)
    assert series.seconds == sorted(series.seconds)
    peaks = [second for second, nbytes in zip(series.seconds, series.nbytes, strict=True) if nbytes == 1000]
    assert len(peaks) == 2
    assert abs(peaks[0] - 7) < 200 and abs(peaks[1] - 54_321) < 200
    assert series.seconds[-1] > 99_800


def test_futures_know_when_they_ran():
    with fedexec.create_executor("inline", max_workers=1) as executor:
        before = time.time()
        future = executor.submit(time.sleep, 0.1)
        assert future.ended is None
        queued = executor.submit(os.getpid)
        queued.result()
        cancelled = executor.submit(os.getpid)
        cancelled.cancel()
    assert future.started is not None and future.ended is not None and queued.started is not None
    assert before <= future.started <= future.ended - 0.1
    assert queued.started >= future.ended
    assert cancelled.done() and (cancelled.started is None) == cancelled.cancelled()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "loky"])
def test_where_no_pid_is_told_memory_is_back_too_when_the_task_is_done(emulate, backend):
    gpu = emulate()
    with fedexec.create_executor(backend, max_workers=1, initializer=jobs.tell_no_device_bytes) as executor:
        for _ in range(2):
            future = executor.submit(jobs.touch, 100 * MIB)
            future.result()
            assert gpu.used_bytes() == 0
        assert future.usage is not None
        assert future.usage.end_device_bytes is None
