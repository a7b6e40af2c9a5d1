import functools
import math

import pytest

from fedexec import SettingsError, create_executor
from fedexec.interface import Task, once


class Wrapped:
    """A callable with an attribute of the name that functools.partial uses."""

    def __init__(self):
        self.func = self

    def __call__(self):
        return 7


def test_a_partial_is_of_its_functions_kind():
    assert Task(functools.partial(functools.partial(divmod, 7), 2), (), {}).kind == "builtins.divmod"


def test_no_other_callable_is_unwrapped():
    task = Task(Wrapped(), (), {})
    assert task.name == "Wrapped"
    assert task.kind.endswith("test_interface.Wrapped")


def test_a_tag_is_part_of_the_name_and_not_of_the_kind():
    task = Task(divmod, (), {}, tag="client 7")
    assert (task.name, task.kind) == ("divmod [client 7]", "builtins.divmod")


def test_a_declared_function_stays_itself_and_a_builtin_is_wrapped():
    def fit():
        return 7

    assert once(fit) is fit
    assert not Task(functools.partial(fit), (), {}).repeatable
    assert once(divmod)(7, 2) == (3, 1)
    assert not Task(once(divmod), (), {}).repeatable
    assert Task(divmod, (), {}).repeatable


def test_options_that_make_no_sense_are_refused_and_none_is_lost():
    with create_executor("inline", timeout=5, retries=2) as executor:
        for wrong in ({"timeout": 0}, {"timeout": -1}, {"retries": -1}, {"retries": 1.5}):
            with pytest.raises(SettingsError):
                executor.with_options(**wrong)
        view = executor.with_options(timeout=math.inf)
        assert (view.settings.timeout, view.settings.retries) == (None, 2)
        assert executor.settings.timeout == 5
