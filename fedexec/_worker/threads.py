"""Limits how many threads numerical libraries use in a worker, so that workers share the cores."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

from fedexec._system.environment import environment

__all__ = ["THREAD_VARIABLES", "keep_torch_threads", "limit_loaded", "limit_threads", "threads_of_task"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def limit_threads(environ: Mapping[str, str]) -> None:
    """Limit the threads of torch, and of libraries that will be loaded later, in this process.

    Parameters
    ----------
    environ : mapping of str to str
        Environment variables to set, such as ``OMP_NUM_THREADS``.
    """
    for name, value in environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    torch = sys.modules.get("torch")
    number = _torch_threads or _threads_of(environ, "OMP_NUM_THREADS")
    if torch is not None and number and number != torch.get_num_threads():
        torch.set_num_threads(number)


def limit_loaded(environ: Mapping[str, str]) -> None:
    """Limit the threads of libraries that are already loaded here, for workers forked from this process.

    These libraries read the environment only once. Here the limit costs no worker anything. OpenBLAS starts
    its threads at once, ends them before a fork, and starts them again in a worker that computes.

    Parameters
    ----------
    environ : mapping of str to str
        Environment variables such as ``OMP_NUM_THREADS``.
    """
    from threadpoolctl import ThreadpoolController

    variables = {"openmp": "OMP_NUM_THREADS", "mkl": "MKL_NUM_THREADS", "openblas": "OPENBLAS_NUM_THREADS"}
    for library in ThreadpoolController().lib_controllers:
        variable = variables.get(library.user_api) or variables.get(library.internal_api)
        number = _threads_of(environ, variable) if variable else 0
        if library.user_api == "openmp":  # torch uses the same setting
            number = _torch_threads or number
        if number and number != library.num_threads:
            library.set_num_threads(number)


@contextlib.contextmanager
def threads_of_task(number: int | None) -> Iterator[None]:
    """Have numerical libraries use so many threads while a task runs.

    Parameters
    ----------
    number : int or None
        None changes nothing.

    Yields
    ------
    None
    """
    if number is None:
        yield
        return
    from threadpoolctl import threadpool_limits

    torch = sys.modules.get("torch")
    torch_before = torch.get_num_threads() if torch is not None else None
    with environment(**dict.fromkeys(THREAD_VARIABLES, str(number))), threadpool_limits(number):
        if torch is not None:
            torch.set_num_threads(number)
        try:
            yield
        finally:
            if torch is not None:
                torch.set_num_threads(torch_before)


def keep_torch_threads() -> None:
    """Have forked workers keep the number of threads that an import has set in torch.

    Otherwise the number in the environment would replace it. A fresh interpreter keeps the number anyway,
    because it imports the module after its threads were limited.
    """
    global _torch_threads
    number = getattr(sys.modules.get("torch"), "get_num_threads", int)()
    _torch_threads = number if number > 1 else 0


_torch_threads = 0  # number that an import has set; 0 if none has, or if it has set one thread


def _threads_of(environ: Mapping[str, str], variable: str) -> int:
    """Return the number of threads in a variable, or 0. OpenMP allows a list, one number a nesting level."""
    number = environ.get(variable, "").partition(",")[0]
    return max(1, int(number)) if number.isdecimal() else 0
