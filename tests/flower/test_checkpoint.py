"""Checkpoints: whole or not at all, and read without executing what is in them."""

import os
import pickle

import numpy as np
import pytest

from fedexec.flower.checkpoint import Checkpoint, CheckpointError, latest, save

WEIGHTS = [np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros(0), np.float64(3.5) * np.ones(())]


def state(server_round, weights=WEIGHTS):
    rounds = [{"server_round": number, "loss": 1 / 3} for number in range(server_round + 1)]
    return Checkpoint(server_round, weights, rounds, {"seed": 7})


def test_what_was_written_is_read_to_the_bit(tmp_path):
    save(tmp_path, state(3))
    found = latest(tmp_path)
    assert (found.server_round, found.rounds, found.settings) == (3, state(3).rounds, {"seed": 7})
    for left, right in zip(found.weights, WEIGHTS, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_the_last_two_are_kept_and_nothing_else(tmp_path):
    for server_round in range(12):
        save(tmp_path, state(server_round))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000010.npz", "round-000011.npz"]
    assert latest(tmp_path).server_round == 11


def test_an_empty_directory_has_none(tmp_path):
    assert latest(tmp_path) is None


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied", "another format"])
def test_a_spoilt_checkpoint_gives_way_to_the_one_before(tmp_path, harm):
    save(tmp_path, state(1))
    newest = save(tmp_path, state(2))
    data = bytearray(newest.read_bytes())
    if harm == "cut":
        data = data[: len(data) // 2]
    elif harm == "flipped":
        at = data.index(WEIGHTS[0].tobytes())
        data[at + 5] ^= 0xFF
    elif harm == "emptied":
        data = b""
    else:
        data = b"PK\x03\x04 but nothing that follows makes sense"
    newest.write_bytes(data)
    assert latest(tmp_path).server_round == 1
    (tmp_path / "round-000001.npz").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"round-000002\.npz is no checkpoint"):
        latest(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_code_in_a_checkpoint_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    with (tmp_path / "round-000001.npz").open("wb") as file:
        np.savez(file, about=np.array([Bomb()], dtype=object))
    (tmp_path / "round-000002.npz").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        latest(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_arrays_of_objects_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Python objects"):
        save(tmp_path, state(1, [np.array([object()])]))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, state(1))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001.npz"]
