"""The import hook of seeded tasks is in nobody's way."""

import importlib.util
import sys
from typing import Any

import pytest

from fedexec._system import available_resources
from fedexec._worker import seeding


def test_a_task_may_change_the_list_of_finders():
    before = list(sys.meta_path)
    try:
        with seeding.seeded(1):
            sys.meta_path[:] = before
    finally:
        assert sys.meta_path == before


@pytest.mark.parametrize("name", ["numpy.random"])
def test_a_library_that_is_not_imported_yet_tells_where_it_lies(name, monkeypatch):
    pytest.importorskip("numpy")
    monkeypatch.delitem(sys.modules, name, raising=False)
    with seeding.seeded(1):
        found: Any = importlib.util.find_spec(name)
        assert found.loader.get_filename(name).endswith("__init__.py")


def test_a_generator_of_another_kind_in_the_place_of_numpys_is_renewed_too():
    random = pytest.importorskip("numpy.random")
    before = random.get_bit_generator()
    try:
        random.set_bit_generator(random.PCG64(1))
        state = random.get_bit_generator().state["state"]
        seeding.renew()
        assert random.get_bit_generator().state["state"] != state
    finally:
        random.set_bit_generator(before)


def test_renewing_changes_all_of_numpys_state():
    random = pytest.importorskip("numpy.random")
    random.seed(1)
    random.standard_normal()
    state = random.get_state()
    seeding.renew()
    now = random.get_state()
    assert (now[1] != state[1]).sum() > 600 and now[3] == 0


@pytest.mark.parametrize("text", ["9" * 5000, "9" * 400 + " 1", "x" * 9000])
def test_garbage_bounds_nothing(text, tmp_path, monkeypatch):
    for file in ("cpu.max", "memory.max", "memory.current"):
        (tmp_path / file).write_text(text)
    (tmp_path / "membership").write_text("0::/")
    monkeypatch.setattr(available_resources, "TOP", str(tmp_path))
    monkeypatch.setattr(available_resources, "MEMBERSHIP", str(tmp_path / "membership"))
    assert available_resources.available_cores() >= 1
    assert available_resources.available_bytes() > 0
