"""Arrays through shared memory: the right bytes, once, and given back."""

import errno
import gc
import mmap
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest

import fedexec
from fedexec._channel import messages, segment_pool, segments
from fedexec._channel.messages import Delivery
from fedexec._channel.segment_pool import SegmentPool
from fedexec._channel.task_channel import TaskChannel
from fedexec._worker import running
from fedexec.interface import Task

pytestmark = pytest.mark.skipif(not segments.supported(), reason="needs memfd_create and /proc")

MIB = 1 << 20
SHARING = ["standby", "process", "pool", "loky"]


def arrays(seed=0, count=4, size=MIB):
    rng = np.random.default_rng(seed)
    return [rng.random(size // 8) for _ in range(count)]


def add_one(values):
    """Change the arguments in place, and return something else."""
    for value in values:
        value += 1
    return [value * 2 for value in values]


def echo(value):
    return value


def eventually(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"


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


def test_memory_is_given_back_when_the_last_view_is_gone():
    with fedexec.create_executor("standby", max_workers=1) as executor:
        pool = executor._scheduler._backend.channel._pool
        result = executor.submit(echo, arrays(count=8)).result()
        last = result[3]
        del result
        eventually(lambda: pool.used_bytes() == 8 * MIB)
        np.testing.assert_array_equal(last, arrays(count=8)[3])
        del last
        eventually(lambda: pool.used_bytes() == 0)


def test_memory_is_given_back_when_the_worker_dies():
    with fedexec.create_executor("standby", max_workers=1) as executor:
        pool = executor._scheduler._backend.channel._pool
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
        pool = executor._scheduler._backend.channel._pool
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


# ---------------------------------------------------------------- the pool itself, without processes


def test_the_same_arrays_are_written_once():
    pool = SegmentPool()
    sent = arrays()
    with pool.parcel(sent) as first, pool.parcel([array.copy() for array in sent]) as second:
        assert first._there is second._there
    pool.close()


def test_the_same_arrays_are_written_once_though_nobody_reads_them_meanwhile(monkeypatch):
    """As with one worker, which has ended before the next gets them."""
    written = []
    write = segments.Segment.write
    monkeypatch.setattr(
        segments.Segment, "write", lambda self, *args: (written.append(self), write(self, *args))
    )
    pool = SegmentPool()
    array = np.ones(1 << 20, np.float32)
    for _ in range(4):
        with pool.parcel(array):
            pass
    pool.close()
    assert len(written) == 1


def test_the_same_objects_are_compared_only_if_they_may_have_changed(monkeypatch):
    compared = []
    memcmp = segments._memcmp
    monkeypatch.setattr(segments, "_memcmp", lambda *args: compared.append(args) or memcmp(*args))
    pool = SegmentPool()
    sent = arrays(count=1)
    submitted = time.monotonic()
    with pool.parcel(sent, submitted) as first, pool.parcel(sent, submitted) as second:
        assert first._there is second._there
        assert len(compared) == 0
        sent[0][-1] = 5.0
        with pool.parcel(sent, time.monotonic()) as third:
            assert len(compared) == 1
            assert Delivery(third.message).open()[0][-1] == 5.0
    pool.close()


class Fleeting:
    """Makes its array while it is pickled: the next may lie where this one lay."""

    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return echo, (np.full(MIB, self.value),)


def test_arrays_that_only_pickling_makes_are_not_taken_for_each_other():
    pool = SegmentPool()
    for value in range(3):
        with pool.parcel(Fleeting(value), since=0.0) as parcel:
            assert Delivery(parcel.message).open()[0] == value
    pool.close()


def test_arrays_changed_in_place_are_written_anew():
    pool = SegmentPool()
    sent = arrays()
    with pool.parcel(sent) as first:
        sent[-1][-1] = 5.0
        with pool.parcel(sent) as second:
            assert first._there is not second._there
            assert Delivery(second.message).open()[-1][-1] == 5.0
            assert Delivery(first.message).open()[-1][-1] == arrays()[-1][-1]
    pool.close()


def test_a_delivery_says_whether_somebody_still_looks():
    pool = SegmentPool()
    with pool.parcel(arrays()) as parcel:
        delivery = Delivery(parcel.message)
        received = delivery.open()
        assert not delivery.close()
        del received
        gc.collect()
        assert delivery.close()
    pool.close()


def test_a_worker_that_cannot_open_the_memory_gets_everything_in_the_message(monkeypatch, caplog):
    def refuse(self, size, *, write):
        raise segments.UnreachableSegmentError("Permission denied")

    monkeypatch.setattr(segments.Place, "open", refuse)
    channel = TaskChannel(shared_memory=True)
    sent = arrays()
    messages = []

    def call(message):
        messages.append(len(message))
        return running.run(message)

    outcome = channel.deliver(Task(echo, (sent,), {}), call)
    np.testing.assert_array_equal(outcome.value[0], sent[0])
    assert messages[0] < 10_000 < 4 * MIB < messages[1]
    assert "Permission denied" in caplog.text
    channel.deliver(Task(echo, (sent,), {}), call)
    assert len(messages) == 3, "it should not be tried again"
    channel.close()


def test_without_shared_memory_nothing_is_opened(monkeypatch):
    monkeypatch.setattr(os, "memfd_create", None)
    channel = TaskChannel(shared_memory=False)
    outcome = channel.deliver(Task(echo, (arrays(),), {}), running.run)
    np.testing.assert_array_equal(outcome.value[0], arrays()[0])
    channel.close()


# ---------------------------------------------------------------- torch


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="needs torch")


def round_trip(value):
    pool = SegmentPool()
    with pool.parcel(value) as parcel:
        size = len(parcel.message)
        result = parcel.open(Delivery(parcel.message).answer(Delivery(parcel.message).open()))
    pool.close()
    return result, size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "uint8", "bool"])
def test_tensors_travel_like_arrays(torch, dtype):
    tensor = (torch.arange(4 * MIB) % 7).to(getattr(torch, dtype)).reshape(4, -1)
    result, size = round_trip(tensor)
    assert size < 10_000
    assert result.dtype == tensor.dtype
    assert torch.equal(result, tensor)
    result.fill_(1)


def test_parameters_modules_and_gradients_survive(torch):
    module = torch.nn.Linear(1000, 600)
    module.bias.requires_grad_(False)
    (copy, plain), size = round_trip((module, torch.ones(MIB, requires_grad=True)))
    assert size < 20_000
    assert type(copy.weight) is torch.nn.Parameter
    assert torch.equal(copy.weight, module.weight)
    assert (copy.weight.requires_grad, copy.bias.requires_grad, plain.requires_grad) == (True, False, True)
    copy(torch.ones(1, 1000)).sum().backward()


def test_tensors_that_are_no_plain_arrays_survive_too(torch):
    strided = torch.arange(6.0).reshape(2, 3).T
    empty = torch.zeros(0, 3)
    complex_ = torch.ones(3, dtype=torch.complex64)
    sparse = torch.eye(3).to_sparse()
    result, _ = round_trip([strided, empty, complex_, sparse])
    assert torch.equal(result[0], strided)
    assert result[0].stride() == strided.stride()
    assert result[1].shape == (0, 3)
    assert torch.equal(result[2], complex_)
    assert torch.equal(result[3].to_dense(), torch.eye(3))


@pytest.mark.filterwarnings("ignore")
def test_every_kind_of_tensor_arrives_as_it_was(torch):
    hooked = torch.ones(3, requires_grad=True)
    kinds = {
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "jagged": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "csr": torch.eye(3).to_sparse_csr(),
        "conjugate": torch.ones(3, dtype=torch.complex64).conj(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta": torch.ones(3, device="meta"),
        "scalar": torch.tensor(3.0),
        "buffer": torch.nn.Buffer(torch.ones(3)),
        "hooked": hooked,
    }
    result, _ = round_trip(kinds)
    for name, tensor in kinds.items():
        assert type(result[name]) is type(tensor), name
        assert (result[name].dtype, result[name].layout) == (tensor.dtype, tensor.layout), name
        assert re.sub(r"j\d+", "j", repr(result[name])) == re.sub(r"j\d+", "j", repr(tensor)), name


def count_descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_results_that_are_kept_hold_few_descriptors():
    pool = SegmentPool()
    before = count_descriptors()
    kept = []
    for number in range(100):
        with pool.parcel(number) as parcel:
            kept.append(parcel.open(Delivery(parcel.message).answer(np.full(2 * MIB, number, np.uint8))))
    assert count_descriptors() - before <= segment_pool.KEPT_RESULTS + 2
    assert [int(array[-1]) for array in kept] == list(range(100))
    pool.close()
    assert [int(array[0]) for array in kept] == list(range(100))
    del kept
    assert count_descriptors() == before


def test_without_descriptors_arrays_travel_in_the_message(monkeypatch):
    def refused(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    pool = SegmentPool()
    monkeypatch.setattr(os, "memfd_create", refused)
    with pool.parcel(np.arange(MIB)) as parcel:
        assert len(parcel.message) > 8 * MIB
        result = parcel.open(Delivery(parcel.message).answer(Delivery(parcel.message).open() + 1))
    assert result[-1] == MIB
    pool.close()


def test_a_message_is_plain_pickle():
    pool = SegmentPool(enabled=False)
    with pool.parcel([1, np.arange(3)]) as parcel:
        assert isinstance(pickle.loads(parcel.message), messages.TaskMessage)
    pool.close()
