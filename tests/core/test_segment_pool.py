"""The pool of segments itself, without processes: what is written once, and what is given back."""

import errno
import gc
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
from sharing import MIB, arrays, echo

from fedexec._channel import held_buffers, messages, segment_pool, segments
from fedexec._channel.messages import Delivery
from fedexec._channel.segment_pool import SegmentPool
from fedexec._channel.task_channel import TaskChannel
from fedexec._channel.unpickling import loads
from fedexec._worker import running
from fedexec.interface import Task

pytestmark = pytest.mark.skipif(not segments.supported(), reason="needs memfd_create and /proc")


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

    def note_and_write(self, *args):
        written.append(self)
        write(self, *args)

    monkeypatch.setattr(segments.Segment, "write", note_and_write)
    pool = SegmentPool()
    array = np.ones(1 << 20, np.float32)
    for _ in range(4):
        with pool.parcel(array):
            pass
    pool.close()
    assert len(written) == 1


def test_the_same_objects_are_compared_only_if_they_may_have_changed(monkeypatch):
    compared = []
    memcmp = held_buffers._memcmp

    def note_and_compare(*args):
        compared.append(args)
        return memcmp(*args)

    monkeypatch.setattr(held_buffers, "_memcmp", note_and_compare)
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


def unpacked(packed):
    return loads(packed.data, packed.buffers)


def round_trip(value):
    pool = SegmentPool()
    with pool.parcel(value) as parcel:
        size = len(parcel.message)
        result = unpacked(parcel.open(Delivery(parcel.message).answer(Delivery(parcel.message).open())))
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
            answer = Delivery(parcel.message).answer(np.full(2 * MIB, number, np.uint8))
            kept.append(unpacked(parcel.open(answer)))
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
        result = unpacked(parcel.open(Delivery(parcel.message).answer(Delivery(parcel.message).open() + 1)))
    assert result[-1] == MIB
    pool.close()


def test_a_message_is_plain_pickle():
    pool = SegmentPool(enabled=False)
    with pool.parcel([1, np.arange(3)]) as parcel:
        assert isinstance(pickle.loads(parcel.message), messages.TaskMessage)
    pool.close()
