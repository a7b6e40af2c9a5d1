"""How many threads numerical libraries may use in a worker: its share of the cores."""

import os
import sys
from collections.abc import Mapping

__all__ = ["THREAD_VARIABLES", "keep_torch_threads", "limit_loaded", "limit_threads"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def limit_threads(environ: Mapping[str, str]) -> None:
    """Hold this process to its share of the cores: torch, and libraries that will be loaded."""
    for name, value in environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    torch = sys.modules.get("torch")
    number = _torch_threads or _threads_of(environ, "OMP_NUM_THREADS")
    if torch is not None and number and number != torch.get_num_threads():
        torch.set_num_threads(number)


def limit_loaded(environ: Mapping[str, str]) -> None:
    """Hold the workers that are forked from this process to their share: libraries that are loaded already.

    They read their environment only once. Here this costs a worker nothing; OpenBLAS starts threads at once,
    ends them before a fork, and starts them again in a worker that computes.
    """
    from threadpoolctl import ThreadpoolController

    variables = {"openmp": "OMP_NUM_THREADS", "mkl": "MKL_NUM_THREADS", "openblas": "OPENBLAS_NUM_THREADS"}
    for library in ThreadpoolController().lib_controllers:
        variable = variables.get(library.user_api) or variables.get(library.internal_api)
        number = _threads_of(environ, variable) if variable else 0
        if library.user_api == "openmp":  # torch's setting, too
            number = _torch_threads or number
        if number and number != library.num_threads:
            library.set_num_threads(number)


def keep_torch_threads() -> None:
    """Have workers keep the number of threads that an import has told torch: where they are forked from.

    There the environment says one. A fresh interpreter keeps it anyway: it imports after it was limited.
    """
    global _torch_threads
    number = getattr(sys.modules.get("torch"), "get_num_threads", int)()
    _torch_threads = number if number > 1 else 0


_torch_threads = 0  # that an import has asked for; one cannot be told from none


def _threads_of(environ: Mapping[str, str], variable: str) -> int:
    """Return a number of threads; 0 if it is none. OpenMP allows a list, one number a nesting level."""
    number = environ.get(variable, "").partition(",")[0]
    return max(1, int(number)) if number.isdecimal() else 0
