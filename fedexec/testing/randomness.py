"""Conformance tests of the random numbers that tasks draw."""

from pathlib import Path
from typing import Any

import pytest

from fedexec.errors import SettingsError
from fedexec.interface import Capability
from fedexec.testing import bad_tasks
from fedexec.testing.suite import Create, Suite
from fedexec.testing.tasks import DEADLINE

__all__ = ["RandomnessConformance"]


class RandomnessConformance(Suite):
    """Tasks draw independent numbers, or numbers that a seed determines."""

    @pytest.mark.parametrize("preload", [(), ("numpy.random",)], ids=["imported by the task", "preloaded"])
    def test_tasks_draw_different_numbers(self, create: Create, preload: tuple[str, ...]) -> None:
        executor = create(preload=preload)
        drawn = [future.result(DEADLINE) for future in [executor.submit(bad_tasks.draw) for _ in range(6)]]
        assert len({python for python, _ in drawn}) == 6
        assert len({numpy for _, numpy in drawn}) == 6

    def test_with_a_seed_a_task_draws_what_follows_from_it_and_its_number(self, create: Create) -> None:
        self.need(Capability.ISOLATED)
        first = create(seed=42)
        expected = [future.result(DEADLINE) for future in [first.submit(bad_tasks.draw) for _ in range(4)]]
        assert len(set(expected)) == 4
        again = create(seed=42, max_workers=1, preload=["numpy.random"])
        assert [again.submit(bad_tasks.draw).result(DEADLINE) for _ in range(4)] == expected
        assert again.submit(bad_tasks.draw).result(DEADLINE) not in expected
        assert create(seed=43).submit(bad_tasks.draw).result(DEADLINE) not in expected
        assert expected[0] == bad_tasks.drawn_by_the_first_task_of(42), "other backends draw other numbers"

    def test_executors_that_tasks_make_follow_from_the_seed_and_the_task(
        self, create: Create, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.need(Capability.ISOLATED)
        monkeypatch.setenv("FEDEXEC_SEED", "42")
        runs = []
        for _ in range(2):
            executor = create(max_workers=1)
            calls = bad_tasks.draw_in_an_executor, bad_tasks.draw_in_an_executor, bad_tasks.draw
            runs.append([executor.submit(call).result(DEADLINE) for call in calls])
        assert runs[0] == runs[1]
        assert len({bad_tasks.drawn_by_the_first_task_of(42), *runs[0]}) == 4

    def test_what_unpickling_draws_does_not_change_what_a_task_draws(self, create: Create) -> None:
        self.need(Capability.ISOLATED)
        plain = create(seed=1).submit(bad_tasks.draw_with, 0).result(DEADLINE)
        assert (
            create(seed=1).submit(bad_tasks.draw_with, bad_tasks.DrawsAtUnpickle()).result(DEADLINE) == plain
        )

    def test_a_task_that_is_tried_again_draws_the_same_again(self, create: Create, tmp_path: Path) -> None:
        self.need(Capability.SURVIVES_DEATH)
        executor = create(seed=7, retries=1)
        drawn = executor.submit(bad_tasks.draw_after_death, tmp_path / "died").result(DEADLINE)
        assert drawn == create(seed=7).submit(bad_tasks.draw).result(DEADLINE)

    @pytest.mark.parametrize("seed", [-1, 1.5, True, "x"])
    def test_a_seed_that_is_no_whole_number_is_refused(self, create: Create, seed: Any) -> None:
        with pytest.raises(SettingsError, match="seed must"):
            create(seed=seed)
