import functools

from fedexec.interface import Task


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
