"""Flower's quickstart with PyTorch, in the shape its authors ship it: the same weights on every backend."""

import contextlib
import sys
from pathlib import Path

import numpy as np
import pytest

from fedexec._workload import data as digits
from fedexec.flower import read_app, simulate
from fedexec.flower.simulation.simulate import start
from fedexec.settings import resolve

pytestmark = [pytest.mark.flower, pytest.mark.torch]

DIRECTORY = Path(__file__).parent / "quickstart_app"
ROWS = 160


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app, and its data as parquet, which needs pyarrow, or as numpy's file."""
    directory = tmp_path_factory.mktemp("quickstart") / "digits"
    directory.mkdir()
    with np.load(Path(digits.__file__).with_name("digits.npz")) as archive:
        images, labels = archive["images"][:ROWS], archive["labels"][:ROWS].astype(np.int64)
    columns = {"img": images.reshape(ROWS, -1), "label": labels}
    write_table(directory / "train", columns)
    before = list(sys.path)
    yield read_app(DIRECTORY).configured([f"data='{directory}'"])
    sys.path[:] = before


def write_table(file, columns):
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        np.savez(file.with_suffix(".npz"), **columns)
        return
    table = pa.table({name: values.tolist() for name, values in columns.items()})
    parquet.write_table(table, file.with_suffix(".parquet"))


@contextlib.contextmanager
def started(app, backend):
    settings = resolve({"backend": backend, "max_workers": 2, "threads_per_worker": 1})
    server, executor = start(app.server, app.client, settings)
    with executor:
        yield lambda **more: simulate(
            server, app.client, num_nodes=2, executor=executor, run_config=app.run_config | more, seed=0
        )


@pytest.fixture(scope="module")
def standby(app):
    with started(app, "standby") as run:
        yield run


@pytest.fixture(scope="module")
def reference(standby):
    return standby()


def weights(simulation):
    return {name: array.numpy().tobytes() for name, array in simulation.result.arrays.items()}


def test_each_message_runs_in_a_process_of_its_own_and_the_app_learns(reference, caplog):
    assert [record for record in caplog.get_records("setup") if record.name == "fedexec"] == []  # forked
    assert [round_.clients for round_ in reference.rounds] == [[], [0, 1], [0, 1]]
    assert all(round_.failures == [] for round_ in reference.rounds)
    assert reference.rounds[-1].loss < reference.rounds[0].loss
    assert len({record.usage.worker_pid for record in reference.tasks}) == 8


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["pool", "process", "loky"])
def test_the_same_seed_shuffles_and_trains_the_same_in_all_workers(app, reference, backend):
    with started(app, backend) as run:
        assert weights(run()) == weights(reference)


@pytest.mark.thorough
def test_without_isolation_the_weights_are_the_same_where_nothing_is_shuffled(app, standby, reference):
    with started(app, "inline") as run:
        unshuffled = weights(run(shuffle=False))
    assert unshuffled == weights(standby(shuffle=False)) != weights(reference)
