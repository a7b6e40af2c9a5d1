"""The data needs numpy only; CIFAR-10 is read by torchvision from an archive in its own format."""

import gc
import hashlib
import pickle
import threading
import time

import numpy as np
import pytest

from fedexec._workload import data
from fedexec._workload.data import DataError, DataSpec, load_data, partition


@pytest.fixture(autouse=True)
def _fresh_cache():
    data._load_raw.cache_clear()
    yield
    data._load_raw.cache_clear()


def test_digits_are_enlarged_and_normalised():
    samples = load_data(DataSpec(clients=3), client=1)
    assert samples.images.shape == (479, 3, 32, 32)
    assert samples.images.dtype == np.float32
    assert samples.images.min() >= -1
    assert samples.images.max() <= 1
    assert samples.images.std() > 0.3
    assert (samples.images[:, 0] == samples.images[:, 2]).all()
    assert samples.labels.dtype == np.int64
    assert set(samples.labels) == set(range(10))


def test_enlarging_keeps_a_constant_image_and_a_ramp():
    weights = data._bilinear_weights(8, 32)
    np.testing.assert_allclose(weights.sum(axis=1), 1)
    ramp = weights @ np.arange(8, dtype=np.float32)
    assert (np.diff(ramp) >= 0).all()
    np.testing.assert_allclose(ramp[2:30], (np.arange(2, 30) + 0.5) / 4 - 0.5, rtol=1e-6)


def test_nobody_trains_on_the_test_set():
    spec = DataSpec(clients=1)
    train = {image.tobytes() for image in load_data(spec, client=0).images}
    test = load_data(spec).images
    assert len(test) == 360
    # The set holds a few true duplicates; what counts is that no sample is in both by index.
    assert sum(image.tobytes() in train for image in test) <= 2


@pytest.mark.parametrize("kind", data.PARTITIONS)
@pytest.mark.parametrize("clients", [1, 7, 400])
def test_every_sample_has_one_owner_and_every_client_a_sample(kind, clients):
    labels = np.arange(1437) % 10
    parts = partition(labels, DataSpec(partition=kind, clients=clients, alpha=0.1, seed=3))
    assert len(parts) == clients
    assert all(len(part) for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1437))


@pytest.mark.parametrize("kind", data.PARTITIONS)
def test_the_seed_decides_the_partition(kind):
    labels = np.arange(500) % 10
    first, again, other = (
        partition(labels, DataSpec(partition=kind, clients=5, seed=seed)) for seed in (1, 1, 2)
    )
    assert all((left == right).all() for left, right in zip(first, again, strict=True))
    assert any(left.tolist() != right.tolist() for left, right in zip(first, other, strict=True))


def test_a_small_alpha_makes_clients_unlike():
    labels = np.arange(2000) % 10

    def dominance(alpha):
        parts = partition(labels, DataSpec(partition="dirichlet", clients=10, alpha=alpha))
        return np.mean([np.bincount(labels[part], minlength=10).max() / len(part) for part in parts])

    assert dominance(0.1) > 0.4 > 0.2 > dominance(100.0)


def test_more_clients_than_samples_is_an_error():
    with pytest.raises(DataError, match="2000 clients cannot share 1437"):
        load_data(DataSpec(clients=2000), client=0)


def test_a_damaged_file_is_an_error_that_names_it(tmp_path, monkeypatch):
    damaged = tmp_path / "digits.npz"
    damaged.write_bytes(b"PK\x03\x04 not really")
    monkeypatch.setattr(data, "_DIGITS", damaged)
    with pytest.raises(DataError, match=r"digits\.npz is damaged"):
        load_data(DataSpec(), client=0)


# ---------------------------------------------------------------- CIFAR-10


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Write a small archive in CIFAR-10's on-disk format, and tell torchvision its checksums."""
    torchvision = pytest.importorskip("torchvision", reason="needs torchvision")
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    images = rng.integers(0, 256, size=(60, 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(0, 10, size=60).tolist()

    def write(name, content):
        raw = pickle.dumps(content)
        (folder / name).write_bytes(raw)
        return [name, hashlib.md5(raw).hexdigest()]

    def batch(name, rows):
        return write(name, {"data": images[rows].reshape(-1, 3072), "labels": labels[rows]})

    dataset = torchvision.datasets.CIFAR10
    train = [batch(f"data_batch_{index + 1}", slice(10 * index, 10 * index + 10)) for index in range(5)]
    monkeypatch.setattr(dataset, "train_list", train)
    monkeypatch.setattr(dataset, "test_list", [batch("test_batch", slice(50, 60))])
    filename, checksum = write("batches.meta", {"label_names": [str(label) for label in range(10)]})
    meta = {"filename": filename, "key": "label_names", "md5": checksum}
    monkeypatch.setattr(dataset, "meta", meta)
    return tmp_path, images, labels


def test_cifar10_is_read_from_its_own_format(cifar10):
    directory, images, labels = cifar10
    spec = DataSpec(name="cifar10", directory=str(directory), clients=1)
    train, test = load_data(spec, client=0), load_data(spec)
    np.testing.assert_allclose(train.images, images[:50] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(test.images, images[50:] / 127.5 - 1, atol=1e-6)
    assert train.labels.tolist() == labels[:50]
    assert train.images.flags.c_contiguous


def test_a_damaged_cifar10_is_an_error_that_names_the_directory(cifar10):
    directory, _, _ = cifar10
    (directory / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"garbage")
    with pytest.raises(DataError, match=str(directory)):
        load_data(DataSpec(name="cifar10", directory=str(directory)), client=0)


def test_a_missing_cifar10_says_what_to_do(tmp_path):
    pytest.importorskip("torchvision", reason="needs torchvision")
    with pytest.raises(DataError, match="--download"):
        load_data(DataSpec(name="cifar10", directory=str(tmp_path)), client=0)


def test_threads_may_load_at_once():
    """CPython 3.11 mixes up threads of different depth that parse headers while garbage is collected."""
    failures: list[BaseException] = []

    def load(depth):
        if depth:
            load(depth - 1)
            return
        for _ in range(10):
            data._load_raw.cache_clear()
            try:
                load_data(DataSpec())
            except BaseException as exc:
                failures.append(exc)

    def switch_threads(*_):
        time.sleep(0)

    before = gc.get_threshold()
    gc.set_threshold(20)
    gc.callbacks.append(switch_threads)
    try:
        threads = [threading.Thread(target=load, args=(7 * number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.callbacks.remove(switch_threads)
        gc.set_threshold(*before)
    assert failures == []
