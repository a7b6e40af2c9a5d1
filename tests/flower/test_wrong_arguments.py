"""What makes no sense is refused where it is given, and not in the middle of a run."""

import pytest

import fedexec
from fedexec.flower.grpc import ExecutorClient, FedAvgMp


@pytest.mark.parametrize(
    ("name", "number", "error", "says"),
    [
        ("fit_clients", -2, ValueError, "fit_clients must be at least 1, got -2"),
        ("fit_clients", 0, ValueError, "fit_clients must be at least 1, got 0"),
        ("available_clients", 0, ValueError, "available_clients must be at least 1, got 0"),
        ("evaluate_clients", -1, ValueError, "evaluate_clients must be at least 0, got -1"),
        ("min_results", 0, ValueError, "min_results must be at least 1, got 0"),
        ("fit_clients", 2.5, TypeError, "fit_clients must be a whole number, got 2.5"),
        ("fit_clients", True, TypeError, "fit_clients must be a whole number, got True"),
    ],
)
def test_a_number_of_clients_that_is_none(name, number, error, says):
    with pytest.raises(error, match=says):
        FedAvgMp(**{"fit_clients": 1, "available_clients": 1} | {name: number})


def test_a_function_that_is_none():
    with fedexec.create_executor("inline") as executor:
        with pytest.raises(TypeError, match="fit must be a function, got 3"):
            ExecutorClient(executor, fit=3)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="evaluate must be a function, got 4"):
            ExecutorClient(executor, fit=abs, evaluate=4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="executor must be an executor, got 5"):
        ExecutorClient(5, fit=abs)  # type: ignore[arg-type]
