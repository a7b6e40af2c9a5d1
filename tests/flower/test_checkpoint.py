"""Checkpoints: whole or not at all, read without executing what is in them, of one run at a time."""

import errno
import io
import json
import os
import pickle
import random
import subprocess
import sys
import zipfile
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from fedexec.flower import Round
from fedexec.flower.grpc.checkpoint import Checkpoint, CheckpointError, Checkpoints, _seal

WEIGHTS: list[Any] = [
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.zeros(0),
    np.float64(3.5) * np.ones(()),
]


def state(server_round, weights=WEIGHTS):
    rounds = [Round(number, loss=1 / 3) for number in range(server_round + 1)]
    return Checkpoint(server_round, weights, rounds, {"seed": 7})


def save(directory, *server_rounds):
    """Write these, as one run does."""
    with closing(Checkpoints(directory)) as checkpoints:
        return [checkpoints.save(state(server_round)) for server_round in server_rounds]


def latest(directory):
    with closing(Checkpoints(directory)) as checkpoints:
        return checkpoints.latest()


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def is_same(left, right):
    return (left.server_round, left.rounds, left.settings) == (
        right.server_round, right.rounds, right.settings,
    ) and [(array.dtype, array.shape, array.tobytes()) for array in left.weights] == [
        (array.dtype, array.shape, array.tobytes()) for array in right.weights
    ]  # fmt: skip


def sealed(content):
    """Put the digest behind what is to look like a checkpoint: anybody can."""
    return content + _seal(io.BytesIO(content), len(content))


def test_what_was_written_is_read_to_the_bit(tmp_path):
    save(tmp_path, 3)
    assert is_same(latest(tmp_path), state(3))


def test_numpy_reads_it_too(tmp_path):
    (path,) = save(tmp_path, 3)
    with np.load(path) as file:
        np.testing.assert_array_equal(file["array_00000"], WEIGHTS[0])


def test_the_last_two_are_kept_and_nothing_else(tmp_path):
    save(tmp_path, *range(12))
    assert names(tmp_path) == ["round-000010.npz", "round-000011.npz"]
    assert latest(tmp_path).server_round == 11


def test_a_run_that_goes_on_removes_its_own_only(tmp_path):
    others = tmp_path / "others"
    save(others, 3)
    save(tmp_path, 4, 5)
    kept = {
        "round-000003.npz": (others / "round-000003.npz").read_bytes(),  # of another run
        "round-000002.npz": b"damaged",
        "round-000099.npz": b"damaged too, and newer than all",
        "round-000004 (copy).npz": (tmp_path / "round-000004.npz").read_bytes(),
        "round-best.npz": b"mine",
        ".0123456789abcdef-part": b"of another run",
    }
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        found = checkpoints.latest()
        assert found is not None and found.server_round == 5
        for server_round in (6, 7, 8):
            checkpoints.save(state(server_round))
    assert names(tmp_path) == sorted([*kept, "others", "round-000007.npz", "round-000008.npz"])
    assert {name: (tmp_path / name).read_bytes() for name in kept} == kept


def test_what_a_kill_left_unfinished_goes_when_the_run_goes_on(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path; import numpy as np\n"
        "from flower.test_checkpoint import *\n"
        "checkpoints = Checkpoints(Path(sys.argv[1])); checkpoints.save(state(1))\n"
        "np.savez = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoints.save(state(2))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=_environment(), timeout=60)
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 3, "the lock's file, round 1 and a part of round 2"
    assert latest(tmp_path).server_round == 1
    assert names(tmp_path) == ["round-000001.npz"]


def test_an_empty_directory_has_none(tmp_path):
    assert latest(tmp_path / "new") is None
    assert names(tmp_path / "new") == []


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied", "without a digest", "directory", "fifo"])
def test_a_spoilt_checkpoint_is_named_and_gives_way_to_the_one_before(tmp_path, harm, caplog):
    before, newest = save(tmp_path, 1, 2)

    def spoil(path):
        data = bytearray(path.read_bytes())
        path.unlink()
        match harm:
            case "cut":
                path.write_bytes(data[: len(data) // 2])
            case "flipped":
                data[data.index(WEIGHTS[0].tobytes()) + 5] ^= 0xFF
                path.write_bytes(data)
            case "emptied":
                path.touch()
            case "without a digest":
                path.write_bytes(data[: data.index(b"\nfedexec")])
            case "directory":
                path.mkdir()
            case "fifo":
                os.mkfifo(path)

    spoil(newest)
    assert is_same(latest(tmp_path), state(1))
    assert f"{newest} cannot be read" in caplog.text
    spoil(before)
    with pytest.raises(CheckpointError, match=r"round-000002\.npz is not a checkpoint"):
        latest(tmp_path)


@pytest.mark.thorough
def test_of_many_damaged_files_none_is_read_and_the_one_before_always_is(tmp_path):
    chance = random.Random(7)
    before, newest = save(tmp_path, 1, 2)
    whole = newest.read_bytes()
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for attempt in range(1500):
            newest.write_bytes(_damaged(whole, chance))
            assert is_same(checkpoints.latest(), state(1)), attempt
        before.unlink()
        for _ in range(100):
            newest.write_bytes(_damaged(whole, chance))
            with pytest.raises(CheckpointError):
                checkpoints.latest()
        newest.write_bytes(whole)
        assert is_same(checkpoints.latest(), state(2))


def _damaged(whole, chance):
    data = bytearray(whole)
    while data == whole:
        at = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at : at + chance.randrange(64)] = chance.randbytes(chance.randrange(64))
            case 3:
                data += chance.randbytes(1 + at)
    return bytes(data)


def test_of_damaged_contents_with_a_right_digest_each_is_read_or_refused(tmp_path):
    """Who can write there knows how to make a digest; the readers of what is behind it raise anything."""
    chance = random.Random(8)
    _, newest = save(tmp_path, 1, 2)
    content = newest.read_bytes().partition(b"\nfedexec")[0]
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for _ in range(500):
            newest.write_bytes(sealed(_damaged(content, chance)))
            found = checkpoints.latest()
            assert found is not None and found.server_round in (1, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 1},
        {"version": None},
        {"server_round": 4},
        {"server_round": "3"},
        {"run": "*"},
        {"run": 5},
        {"settings": []},
        {"rounds": []},
        {"rounds": 5},
        {"rounds": [{"no": "round"}]},
    ],
)
def test_a_checkpoint_that_tells_nonsense_is_refused(tmp_path, change):
    (path,) = save(tmp_path, 3)
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(arrays["about"].tobytes()) | change
    path.write_bytes(_packed(**arrays | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}))
    with pytest.raises(CheckpointError):
        latest(tmp_path)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b'{"version": 2}', b"5", b"1" * 100_000])
def test_a_checkpoint_of_hostile_json_is_refused(tmp_path, text):
    (tmp_path / "round-000001.npz").write_bytes(_packed(about=np.frombuffer(text, np.uint8)))
    with pytest.raises(CheckpointError):
        latest(tmp_path)


def test_a_compressed_checkpoint_is_not_blown_up(tmp_path):
    file = io.BytesIO()
    np.savez_compressed(file, about=np.zeros(1 << 20, np.uint8))
    (tmp_path / "round-000001.npz").write_bytes(sealed(file.getvalue()))
    with pytest.raises(CheckpointError, match="compressed"):
        latest(tmp_path)


def _packed(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    assert zipfile.is_zipfile(file)
    return sealed(file.getvalue())


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_code_in_a_checkpoint_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    (tmp_path / "round-000001.npz").write_bytes(_packed(about=np.array([Bomb()], dtype=object)))
    (tmp_path / "round-000002.npz").write_bytes(sealed(pickle.dumps(Bomb())))
    with pytest.raises(CheckpointError):
        latest(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_arrays_of_objects_are_refused(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints, pytest.raises(ValueError, match="Python objects"):
        checkpoints.save(state(1, [np.array([object()])]))
    assert names(tmp_path) == []


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["round-000001.npz"]


def test_a_directory_in_use_is_refused_with_the_pid_until_its_run_has_ended(tmp_path):
    save(tmp_path, 1)
    code = (
        "import sys; from pathlib import Path; from fedexec.flower.grpc.checkpoint import Checkpoints\n"
        "checkpoints = Checkpoints(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=_environment(),
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match=rf"is used by another run: pid {holder.pid} on "):
            latest(tmp_path)
        holder.kill()
        holder.wait()
        assert latest(tmp_path).server_round == 1
    assert names(tmp_path) == ["round-000001.npz"]


def _environment():
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.mark.parametrize("planted", ["link", "fifo", "directory"])
def test_a_lock_that_is_no_file_of_ours_is_not_written_to(tmp_path, planted):
    target = tmp_path / "precious"
    target.write_text("mine")
    directory = tmp_path / "state"
    directory.mkdir()
    match planted:
        case "link":
            (directory / ".lock").symlink_to(target)
        case "fifo":
            os.mkfifo(directory / ".lock")
        case "directory":
            (directory / ".lock").mkdir()
    with pytest.raises(OSError, match=r"\.lock"):
        latest(directory)
    assert target.read_text() == "mine"


def test_where_nothing_can_be_locked_a_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    save(tmp_path, 1)
    assert latest(tmp_path).server_round == 1
    assert f"{tmp_path} cannot be locked (No locks available)" in caplog.text
