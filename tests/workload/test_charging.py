"""What the job's tensors take of an EMULATED device, against sums made by hand."""

import gc

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'fedexec[flower]'")

from fedexec.workload import training  # noqa: E402
from fedexec.workload.charging import computing  # noqa: E402
from fedexec.workload.data import DataSpec  # noqa: E402

CONFIG = {"epochs": 1, "batch_size": 32, "learning_rate": 0.02, "server_round": 1}
KIB, MIB = 1 << 10, 1 << 20


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
