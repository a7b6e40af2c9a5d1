"""Exceptions are what the standard library would raise, read well, and pickle."""

import pickle
import signal
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

import fedexec
from fedexec import errors

EXAMPLES = [
    errors.UnknownBackendError("lokky", ("loky", "pool"), "loky"),
    errors.BackendUnavailableError("loky", "No module named 'loky'", "pip install 'fedexec[loky]'"),
    errors.PreloadError("nope", "Traceback ...\nModuleNotFoundError: No module named 'nope'\n"),
    errors.InitializerError(7, "ValueError('no')"),
    errors.WorkerDiedError(7, -9, "train"),
    errors.WorkerDiedError(None, None, "train"),
    errors.UnpickleError("task", "train", "ValueError('no')"),
    errors.TaskTimeoutError("train", 1.5, 7),
    errors.TaskTimeoutError("train", 1.5, None),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_it_pickles_with_its_fields(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (errors.WorkerDiedError, (errors.WorkerError, BrokenProcessPool, BrokenExecutor)),
        (errors.UnpickleError, (errors.WorkerError, BrokenProcessPool)),
        (errors.InitializerError, (errors.FedexecError, BrokenProcessPool)),
        (errors.PreloadError, (errors.FedexecError, BrokenProcessPool)),
        (errors.TaskTimeoutError, (errors.WorkerError, TimeoutError)),
        (errors.SettingsError, (errors.FedexecError, ValueError)),
        (errors.UnknownBackendError, (errors.SettingsError,)),
        (errors.BackendUnavailableError, (errors.FedexecError, ImportError)),
    ],
)
def test_except_clauses_written_for_the_standard_library_work(error, bases):
    assert issubclass(error, bases[0])
    assert all(issubclass(error, base) for base in bases)


def test_every_error_is_public_and_drawn_in_the_tree():
    assert set(errors.__all__) <= set(fedexec.__all__)
    for name in errors.__all__:
        assert name in errors.__doc__


@pytest.mark.parametrize(
    ("exitcode", "says"),
    [
        (3, "exited with code 3"),
        (0, "exited with code 0"),
        (-signal.SIGSEGV, "was ended by signal 11 (SIGSEGV)"),
        (-signal.SIGKILL, "max_workers"),
        (-64, "signal 64"),
        (None, "unknown way"),
    ],
)
def test_a_death_says_how_and_what_to_do(exitcode, says):
    error = errors.WorkerDiedError(7, exitcode, "train")
    assert says in str(error)
    assert "train" in str(error)


def test_a_death_tells_its_signal():
    assert errors.WorkerDiedError(7, -9, "f").signal == signal.SIGKILL
    assert errors.WorkerDiedError(7, 9, "f").signal is None
