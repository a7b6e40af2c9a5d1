"""Makes ``python -m pytest bench`` write a file that `fedexec report` can read."""

import pytest

from fedexec._bench.plan import MODES, Part, missing, plan
from fedexec._report.schema import KEY, Course, parts_of

MODE = pytest.StashKey[str]()
FAILED = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser):
    parser.addoption("--mode", choices=MODES, default="full", help="which tests run (default: %(default)s)")


def pytest_configure(config):
    config.stash[FAILED] = {}


def pytest_generate_tests(metafunc):
    if "part" not in metafunc.fixturenames:
        return
    group, _, _ = parts_of(f"{metafunc.function.__name__}[]")
    parts = [part for part in plan(metafunc.config.getoption("mode")) if part.group == group]
    metafunc.parametrize("part", parts, ids=_name)


def _name(part: Part) -> str:
    return part.name.partition("[")[2].removesuffix("]")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.excinfo is not None:
        item.config.stash[FAILED][item.name] = f"{call.excinfo.typename}: {call.excinfo.value}".splitlines()[
            0
        ]
    return report


def pytest_benchmark_update_json(config, benchmarks, output_json):
    mode = config.getoption("mode")
    names = [part.name for part in plan(mode)]
    course = Course(mode=mode, planned=names, failed=config.stash[FAILED], missing=missing(mode))
    output_json[KEY] = course.as_dict()


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # A file that is shared need not contain the host's name.
