"""Arrays through shared memory: the right bytes, once, and given back."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest
from sharing import MIB, add_one, arrays, echo, eventually

import fedexec
from fedexec._channel import segments
from fedexec.backend import IsolatingBackend

pytestmark = pytest.mark.skipif(not segments.supported(), reason="needs memfd_create and /proc")

SHARING = ["standby", "process", "pool", "loky"]


def in_shared_memory(array):
    """Return whether an array of this process lies in one of our segments."""
    address = array.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, _, end = line.split()[0].partition("-")
        if int(start, 16) <= address < int(end, 16):
            return "memfd:fedexec" in line
    return False


@pytest.fixture(params=SHARING)
def executor(request):
    if request.param == "loky":
        pytest.importorskip("loky")
    with fedexec.create_executor(request.param, max_workers=2, shared_memory=True) as executor:
        yield executor


def test_arguments_are_writable_copies_and_results_lie_where_the_worker_wrote_them(executor):
    sent = arrays()
    before = [array.copy() for array in sent]
    results = executor.submit(add_one, sent).result()
    for array, original, result in zip(sent, before, results, strict=True):
        np.testing.assert_array_equal(array, original)
        np.testing.assert_array_equal(result, (original + 1) * 2)
        assert result.flags.writeable
        assert in_shared_memory(result)
        result += 1


def test_results_that_are_held_are_not_written_over(executor):
    held = [executor.submit(echo, arrays(seed)).result() for seed in range(6)]
    for seed, results in enumerate(held):
        for expected, result in zip(arrays(seed), results, strict=True):
            np.testing.assert_array_equal(result, expected)


def test_every_dtype_shape_and_order_arrives(executor):
    values = [
        np.arange(2 * MIB, dtype=np.uint8),
        np.asfortranarray(np.arange(300_000, dtype=np.float32).reshape(500, 600)),
        np.arange(600_000)[::2],
        np.zeros((0, 7)),
        np.array(3.5),
        np.array(["2020-01-01"], dtype="datetime64[D]"),
        np.array([{"an": "object"}], dtype=object),
        np.float32(2),
        b"x" * (2 * MIB),
        "text",
    ]
    for value, result in zip(values, executor.submit(echo, values).result(), strict=True):
        np.testing.assert_array_equal(result, value)
        if isinstance(value, np.ndarray):
            assert result.dtype == value.dtype
            assert result.flags.f_contiguous or not value.flags.f_contiguous


def test_small_arrays_travel_in_the_message(executor):
    result = executor.submit(echo, np.arange(10)).result()
    np.testing.assert_array_equal(result, np.arange(10))
    result += 1
    assert not in_shared_memory(result)


def test_too_large_a_task_is_an_error_and_smaller_ones_go_on(executor):
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    huge = np.frombuffer(mmap.mmap(-1, 1 << 44, flags=flags), dtype=np.uint8)  # 16 TiB that nobody touches
    future = executor.submit(echo, huge)
    with pytest.raises(fedexec.TransferError, match="do not fit into memory"):
        future.result()
    assert isinstance(future.exception(), MemoryError)
    assert executor.submit(echo, 7).result() == 7


def test_what_a_task_keeps_is_not_written_over():
    pytest.importorskip("loky")
    with fedexec.create_executor("loky", max_workers=1) as executor:
        assert executor.submit(keep, arrays(1)).result()
        for seed in range(2, 6):
            executor.submit(echo, arrays(seed)).result()
        np.testing.assert_array_equal(executor.submit(kept).result()[0], arrays(1)[0])


_kept = None


def keep(values):
    import test_transport

    test_transport._kept = values
    return True


def kept():
    import test_transport

    return test_transport._kept


def pool_of(executor):
    backend = executor._scheduler._backend
    assert isinstance(backend, IsolatingBackend)
    return backend.channel._pool


def test_memory_is_given_back_when_the_last_view_is_gone():
    with fedexec.create_executor("standby", max_workers=1) as executor:
        pool = pool_of(executor)
        result = executor.submit(echo, arrays(count=8)).result()
        last = result[3]
        del result
        eventually(lambda: pool.used_bytes() == 8 * MIB)
        np.testing.assert_array_equal(last, arrays(count=8)[3])
        del last
        eventually(lambda: pool.used_bytes() == 0)


def test_memory_is_given_back_when_the_worker_dies():
    with fedexec.create_executor("standby", max_workers=1) as executor:
        pool = pool_of(executor)
        for _ in range(3):
            assert isinstance(executor.submit(die, arrays()).exception(), fedexec.WorkerDiedError)
        eventually(lambda: pool.used_bytes() == 0)


def die(values):
    os._exit(1)


def test_results_outlive_the_executor():
    with fedexec.create_executor("standby", max_workers=1) as executor:
        results = executor.submit(echo, arrays()).result()
    for expected, result in zip(arrays(), results, strict=True):
        np.testing.assert_array_equal(result, expected)


def test_rounds_reuse_the_same_memory_and_descriptors():
    with fedexec.create_executor("standby", max_workers=2) as executor:
        pool = pool_of(executor)
        used = []
        for seed in range(12):
            sent = arrays(seed)
            for future in [executor.submit(add_one, sent) for _ in range(6)]:
                future.result()
            used.append((pool.used_bytes(), len(list(Path("/proc/self/fd").iterdir()))))
        bytes_, descriptors = zip(*used[3:], strict=True)
        # What is sent, once, and at most a result for each of the six futures that are held at the same time.
        assert max(bytes_) <= (1 + 8) * 4 * MIB
        assert max(descriptors) - min(descriptors) <= 12
