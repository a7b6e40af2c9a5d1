"""Names of other people's modules that no documentation promises: each that we use is there, or named.

A release of Python, cloudpickle or loky that takes one away fails here by that name, and not somewhere else.
"""

import argparse
import ast
import concurrent.futures
import multiprocessing.managers
import multiprocessing.resource_tracker
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest

import fedexec
import fedexec_backends

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="most are of POSIX's multiprocessing")

OF_MODULES = {
    "_signal": "ITIMER_REAL SIG_DFL default_int_handler pthread_sigmask setitimer set_wakeup_fd signal",
    "argparse": "_SubParsersAction",
    "atexit": "_run_exitfuncs",
    "cloudpickle.cloudpickle": (
        "_DYNAMIC_CLASS_TRACKER_BY_ID _PICKLE_BY_VALUE_MODULES _class_setstate _function_setstate "
        "_lookup_module_and_qualname _make_skeleton_class _make_skeleton_enum"
    ),
    "concurrent.futures.process": "_RemoteTraceback",
    "functools": "_lru_cache_wrapper",
    "importlib._bootstrap": "_find_and_load",
    "loky.backend.resource_tracker": "_resource_tracker",
    "loky.process_executor": "_python_exit process_pool_executor_at_exit",
    "multiprocessing.context": "set_spawning_popen",
    "multiprocessing.forkserver": "MAXFDS_TO_SEND read_signed write_signed",
    "multiprocessing.managers": "Server.handle_request SyncManager._Server",
    "multiprocessing.popen_forkserver": "Popen._launch Popen.DupFd",
    "multiprocessing.popen_spawn_posix": "Popen._launch",
    "multiprocessing.process": (
        "BaseProcess._Popen ORIGINAL_DIR _ParentProcess _children _current_process _parent_process "
        "_process_counter"
    ),
    "multiprocessing.reduction": "ForkingPickler._extra_reducers dump",
    "multiprocessing.resource_tracker": "_resource_tracker getfd main",
    "multiprocessing.spawn": "_main get_command_line get_executable prepare",
    "multiprocessing.util": (
        "Finalize _args_from_interpreter_flags _close_stdin _exit_function _finalizer_registry "
        "_flush_std_streams _log_to_stderr _logger _run_after_forkers spawnv_passfds"
    ),
    "threading": "_register_atexit _shutdown",
    "weakref": "finalize._registered_with_atexit finalize._registry",
}

OF_OBJECTS = {  # whose class does not tell what they have
    "a process": (
        multiprocessing.Process,
        "_args _config _kwargs _popen _target",
    ),
    "a parent process": (
        lambda: multiprocessing.process._ParentProcess("MainProcess", 1, None),  # type: ignore[attr-defined]
        "_sentinel",
    ),
    "the resource tracker": (
        lambda: multiprocessing.resource_tracker._resource_tracker,
        "_fd _lock _pid",
    ),
    "loky's resource tracker": (
        lambda: pytest.importorskip("loky.backend.resource_tracker")._resource_tracker,
        "_fd _lock _pid",
    ),
    "a parser of arguments": (argparse.ArgumentParser, "_option_string_actions"),
    "a thread": (threading.main_thread, "_set_native_id"),
    "a connection": (lambda: multiprocessing.Pipe()[0], "_send_bytes"),
    "a queue": (lambda: multiprocessing.get_context("spawn").SimpleQueue(), "_reader"),
    "a pool": (lambda: concurrent.futures.ProcessPoolExecutor(1), "_shutdown_thread"),
}
# torch's, which is not installed everywhere; the name of a type, for mypy alone; documented all the same.
NOT_LISTED = {"_backward_hooks", "_ActionsContainer", "_exit"}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in OF_MODULES.items() for name in names.split()]
)
def test_a_name_of_a_module_is_there(module, name):
    found = pytest.importorskip(module) if module.startswith("loky") else import_module(module)
    for part in name.split("."):
        assert hasattr(found, part), f"{module}.{name} is gone"
        found = getattr(found, part)


@pytest.mark.parametrize(
    ("whose", "name"), [(whose, name) for whose, (_, names) in OF_OBJECTS.items() for name in names.split()]
)
def test_a_name_of_an_object_is_there(whose, name):
    make, _ = OF_OBJECTS[whose]
    assert hasattr(make(), name), f"{name} of {whose} is gone"


def test_each_that_we_use_is_listed():
    names = [*OF_MODULES.values(), *(names for _, names in OF_OBJECTS.values())]
    listed = {name.rpartition(".")[2] for name in " ".join(names).split()}
    used, ours = _underscored()
    assert used - ours - listed - NOT_LISTED == set()


def _underscored():
    """Return the names with one underscore that our code reaches for, and those that it defines."""
    used, ours = set(), set()
    for package in (fedexec, fedexec_backends):
        for file in Path(package.__path__[0]).rglob("*.py"):
            ours.add(file.stem)
            for node in ast.walk(ast.parse(file.read_text())):
                match node:
                    case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                        ours.add(name)
                    case ast.Name(id=name, ctx=ast.Store()):
                        ours.add(name)
                    case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls"), ctx=ast.Store()):
                        ours.add(name)
                    case ast.Attribute(attr=name):
                        used.add(name)
                    case ast.ImportFrom(names=names):
                        used |= {alias.name for alias in names}
    return {name for name in used if name.startswith("_") and not name.startswith("__")}, ours
