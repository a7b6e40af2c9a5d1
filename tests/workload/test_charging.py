"""What the job's tensors take of an EMULATED device, against sums made by hand."""

import gc
import os
from typing import Any

import numpy as np
import pytest

from fedexec._workload.data import DataSpec

CONFIG = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02, "server_round": 1}
KIB, MIB = 1 << 10, 1 << 20

torch: Any
training: Any
computing: Any


@pytest.fixture(autouse=True, scope="module")
def _import_torch():
    """Import torch only in the process that runs these tests, because that takes seconds."""
    global torch, training, computing
    torch = pytest.importorskip("torch", reason="needs torch: pip install 'fedexec[demo]'")
    from fedexec._workload import training
    from fedexec.devices.emulated.charging import computing


def test_tensors_are_charged_while_they_live(emulate):
    books = emulate("emulated:24GiB")
    with computing() as (_, put):
        weights = put(np.zeros(1024, np.float32)).requires_grad_()
        assert books.allocated_bytes() == 4 * KIB
        view = weights[:10]
        assert books.allocated_bytes() == 4 * KIB, "a view takes nothing"
        product = weights * 2
        assert books.allocated_bytes() == 8 * KIB
        loss = (product * product).sum()  # its product is kept by nobody, `product` by autograd
        del product, view
        gc.collect()
        assert books.allocated_bytes() == 8 * KIB + 512
        loss.backward()
        del loss
        gc.collect()
        assert books.allocated_bytes() == 8 * KIB, "the weights and their gradient"
        del weights
        gc.collect()
        assert books.allocated_bytes() == 0
    assert books.held_bytes() == 450 * MIB + 2 * MIB, "the context and a small segment stay in the process"


def test_a_storage_that_is_resized_is_charged_with_its_new_size(emulate):
    books = emulate("emulated:24GiB")
    with computing():
        tensor = torch.empty(128)
        tensor.resize_(1024)
        assert books.allocated_bytes() == 4 * KIB
        torch.cat([torch.ones(1024), torch.ones(1024)], out=tensor.resize_(0))
        gc.collect()
        assert books.allocated_bytes() == 8 * KIB
        del tensor
        gc.collect()
        assert books.allocated_bytes() == 0


def test_what_outlives_the_block_stays_charged_and_once(emulate):
    books = emulate("emulated:24GiB")

    def make():
        with computing():
            return torch.ones(1024)

    kept = make()
    gc.collect()
    assert books.allocated_bytes() == 4 * KIB
    with computing():
        kept.add_(1)
        assert books.allocated_bytes() == 4 * KIB
    del kept
    gc.collect()
    assert books.allocated_bytes() == 0


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_tensors_are_charged_with_their_parts(emulate):
    books = emulate("emulated:24GiB")
    with computing():
        embedding = torch.nn.Embedding(128, 128, sparse=True)
        embedding(torch.arange(64)).sum().backward()
        gc.collect()
        gradient = 512 + 64 * 128 * 4  # 64 indices of 8 bytes, and their rows
        assert books.allocated_bytes() == 128 * 128 * 4 + gradient
        del embedding
        rows = torch.eye(128).to_sparse_csr()
        gc.collect()
        parts = (rows.crow_indices(), rows.col_indices(), rows.values())
        assert books.allocated_bytes() == sum(
            -(-part.untyped_storage().nbytes() // 512) * 512 for part in parts
        )
        del parts, rows
        gc.collect()
        assert books.allocated_bytes() == 0


def test_what_has_no_bytes_on_a_gpu_is_not_charged(emulate):
    books = emulate("emulated:24GiB")
    with computing():
        shape = torch.empty(1 << 40, device="meta")
        assert shape.numel() and books.held_bytes() == 0
        block = torch.ones(64, 64).to_mkldnn()  # has no storage that could be asked
        gc.collect()
        assert block.layout == torch._mkldnn and books.allocated_bytes() == 0


def test_a_process_forked_inside_takes_nothing(emulate):
    books = emulate("emulated:24GiB")
    with computing():
        before = torch.ones(1024)
        loader = torch.utils.data.DataLoader(range(4), num_workers=1, multiprocessing_context="fork")
        for _ in loader:
            assert set(books.process_bytes()) == {os.getpid()}
    assert len(before) == 1024


def test_a_client_takes_its_samples_its_weights_and_more(emulate):
    books = emulate("emulated:24GiB")
    data = DataSpec()  # one client has them all: 1437 x 3 x 32 x 32 float32
    training.train(training.initial_weights(0), CONFIG, data=data, client=0)
    samples = 1437 * 3 * 32 * 32 * 4
    assert books.peak_bytes() - 450 * MIB >= samples + 3 * 62006 * 4, "samples; weights, gradients, momentum"
    assert books.peak_bytes() - 450 * MIB <= samples + 60 * MIB


def test_charging_changes_no_bit(emulate, monkeypatch):
    monkeypatch.setenv("FEDEXEC_DEVICE", "none")
    data = DataSpec(clients=10)
    plain = training.train(training.initial_weights(0), CONFIG, data=data, client=1)[0]
    validated = training.test(plain, {}, data=data)
    emulate("emulated:24GiB")
    charged = training.train(training.initial_weights(0), CONFIG, data=data, client=1)[0]
    for left, right in zip(plain, charged, strict=True):
        np.testing.assert_array_equal(left, right)
    assert training.test(charged, {}, data=data) == validated


def test_a_full_device_raises_as_torch_does(emulate):
    emulate("emulated:460MiB")
    with pytest.raises(torch.OutOfMemoryError, match="EMULATED GPU 0"):
        training.train(training.initial_weights(0), CONFIG, data=DataSpec(), client=0)
