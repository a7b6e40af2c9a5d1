"""Conformance tests of classes and functions that a script defines, and that workers receive."""

import itertools
from pathlib import Path

from fedexec.interface import Capability
from fedexec.testing.suite import Suite

__all__ = ["DefinitionConformance"]


class DefinitionConformance(Suite):
    """What the caller's script defines reaches the worker, and results have the caller's own classes."""

    def test_a_result_leaves_the_callers_classes_alone(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        out, err, code = self.run_script(
            """
            import enum
            from fedexec import create_executor

            class Config:
                rate = 0.1
                rounds = 0

            class Failure(Exception):
                count = 0

            class Color(enum.Enum):
                RED = 1

            def work(how):
                Config.rounds, Failure.count, Color.note = 1000, 1000, "changed"
                if how == "fail":
                    raise Failure("failed")
                New = type("New", (Config,), {"made": "in the task"})
                return {"value": Config(), "class": Config, "nested": [New(), Color.RED]}[how]

            with create_executor(max_workers=1) as executor:
                for number, how in enumerate(["value", "class", "nested", "fail"]):
                    Config.rate = number
                    future = executor.submit(work, how)
                    Config.rate = "later"
                    error = future.exception()
                    if error is None:
                        value = future.result()
                        print(type(value) is Config or value is Config or value[0].made, end=" ")
                    else:
                        print(type(error) is Failure, end=" ")
                    print(Config.rate, Config.rounds, Failure.count, hasattr(Color, "note"))
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == [
            "True later 0 0 False",
            "True later 0 0 False",
            "in the task later 0 0 False",
            "True later 0 0 False",
        ]

    def test_a_class_that_registers_itself_is_registered_once(self, temp: Path) -> None:
        self.need(Capability.ISOLATED)
        out, err, code = self.run_script(
            """
            from fedexec import create_executor

            known = {}

            class Strategy:
                def __init_subclass__(cls):
                    if cls.__name__ in known:
                        raise ValueError(f"there is a {cls.__name__} already")
                    known[cls.__name__] = cls

            class Mean(Strategy):
                rate = 1

            def work(strategy):
                assert known[type(strategy).__name__] is type(strategy) is Mean
                return known, Mean(), Mean.rate

            with create_executor(max_workers=1) as executor:
                for _ in range(2):
                    found, strategy, rate = executor.submit(work, Mean()).result()
                    print(found == known == {"Mean": type(strategy)}, rate)
                    Mean.rate = 2
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out == ["True 1", "True 2"]

    def test_a_traceback_shows_the_lines_of_a_script(self, temp: Path) -> None:
        out, err, code = self.run_script(
            """
            import linecache, traceback
            from fedexec import create_executor

            def fail(x):
                raise ValueError("diverged")  # in a function

            class Client:
                def fit(self):
                    return [1 / n for n in (1, 0)]  # in a method

            cell = "def in_a_cell():\\n    raise KeyError('cell')  # in a cell\\n"
            name = "<ipython-input-1>"
            linecache.cache[name] = (len(cell), None, cell.splitlines(True), name)
            exec(compile(cell, name, "exec"))

            with create_executor(max_workers=1) as executor:
                for call in (lambda: fail(1), Client().fit, in_a_cell):
                    text = "".join(traceback.format_exception(executor.submit(call).exception()))
                    for line in text.splitlines():
                        if "# in" in line:
                            print(line.strip())
                    print("script.py" in text, "ipython-input" in text, "dynamic-code" in text)
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        lines = [
            ['raise ValueError("diverged")  # in a function', "True False False"],
            ["return [1 / n for n in (1, 0)]  # in a method", "True False False"],
            ["raise KeyError('cell')  # in a cell", "False True False"],
        ]
        # Up to Python 3.11, a comprehension has a frame of its own, with the same line.
        assert list(dict.fromkeys(out)) == list(dict.fromkeys(itertools.chain(*lines)))

    def test_what_only_the_caller_can_import_travels(self, temp: Path) -> None:
        """A plug-in loaded under another name, a module made at run time, a script run by another script."""
        out, err, code = self.run_script(
            """
            import importlib.util, pathlib, runpy, sys, types
            from fedexec import create_executor

            source = '''
            class Item:
                def __init__(self, value):
                    self.value = value

            def helper(item):
                return Item(item.value + 1)

            def task(item):
                return helper(item)
            '''.replace("\\n            ", "\\n")
            folder = pathlib.Path(sys.argv[1])
            (folder / "a-plugin.py").write_text(source)
            spec = importlib.util.spec_from_file_location("plugins.loaded", folder / "a-plugin.py")
            loaded = importlib.util.module_from_spec(spec)
            sys.modules["plugins.loaded"] = loaded
            spec.loader.exec_module(loaded)
            made = types.ModuleType("made_of_nothing")
            sys.modules["made_of_nothing"] = made
            exec(source, vars(made))
            ran = types.SimpleNamespace(**runpy.run_path(str(folder / "a-plugin.py")))
            with create_executor() as executor:
                for each in (loaded, made, ran):
                    back = executor.submit(each.task, each.Item(2)).result()
                    print(type(back) is each.Item, back.value)
            """,
            temp,
            temp,
        )
        assert (out, err, code) == (["True 3"] * 3, "", 0)

    def test_functions_with_a_cache_travel(self, temp: Path) -> None:
        out, err, code = self.run_script(
            """
            import functools
            from fedexec import create_executor

            @functools.lru_cache(maxsize=7)
            def fibonacci(n):
                "Adds up."
                return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

            @functools.cache
            def double(n):
                return 2 * n

            def use(n):
                return double(n), fibonacci.cache_info().maxsize, fibonacci.__doc__, fibonacci.__name__

            @functools.singledispatch
            def kind(value):
                return "any"

            @kind.register
            def _(value: int):
                return "int"

            class Model:
                @functools.singledispatchmethod
                def kind(self, value):
                    return "any"

                @kind.register
                def _(self, value: int):
                    return "int"

                @functools.cached_property
                def size(self):
                    return 3

                @functools.lru_cache
                def scaled(self, factor):
                    return self.size * factor

            with create_executor() as executor:
                print(executor.submit(fibonacci, 50).result(), executor.submit(use, 4).result())
                print(executor.submit(lambda model: model.scaled(2), Model()).result())
                print(list(executor.map(kind, [1, "a"])), list(executor.map(Model().kind, [1, "a"])))
            """,
            temp,
        )
        assert (err, code) == ("", 0)
        assert out[:2] == ["12586269025 (8, 7, 'Adds up.', 'fibonacci')", "6"]
        assert out[2:] == ["['int', 'any'] ['int', 'any']"]
