"""Makes an executor from arguments and environment variables."""

from collections.abc import Callable, Sequence
from typing import Any

from fedexec.executor import Executor
from fedexec.interface import Hooks
from fedexec.settings import options, resolve

__all__ = ["create_executor"]


def create_executor(
    backend: str | None = None,
    *,
    max_workers: int | str | None = None,
    start_method: str | None = None,
    preload: str | Sequence[str] = (),
    initializer: Callable[..., object] | None = None,
    initargs: tuple[Any, ...] = (),
    timeout: float | None = None,
    retries: int | None = None,
    memory_limit: int | str | None = None,
    device_memory_limit: int | str | None = None,
    enforce_limits: bool | None = None,
    device: str | None = None,
    threads_per_worker: int | None = None,
    warmup: Callable[[], object] | None = None,
    max_tasks_per_child: int | None = None,
    standby: int | None = None,
    shared_memory: bool | None = None,
    preload_timeout: float | None = None,
    log_level: str | None = None,
    learn: bool | None = None,
    seed: int | None = None,
    node_backend: str | None = None,
    node_workers: int | str | None = None,
    node_timeout: float | None = None,
    ray_address: str | None = None,
    dask_address: str | None = None,
) -> Executor:
    """Create an executor. Settings that are not given are read from the environment.

    Parameters
    ----------
    backend, max_workers, start_method, preload, timeout, retries, memory_limit, device_memory_limit, \
    enforce_limits, device, threads_per_worker, max_tasks_per_child, standby, shared_memory, \
    preload_timeout, log_level, learn, seed, node_backend, node_workers, node_timeout, ray_address, \
    dask_address : optional
        The settings; :class:`fedexec.Settings` says what each means and what its default is. Sizes are
        bytes, or text such as ``"512MiB"``; times are seconds. `preload` takes one name or several. The
        variable of a setting is ``FEDEXEC_`` and its name in capitals, such as ``FEDEXEC_BACKEND``.
    initializer, initargs : callable and tuple, optional
        ``initializer(*initargs)`` is called in every worker before its first task. If it raises, the executor
        is broken.
    warmup : callable, optional
        ``warmup()`` is called once in the template, after the preload. All workers inherit what it imports,
        loads and caches. If it leaves a thread, or starts CUDA (see :func:`fedexec.devices.hidden`), workers
        cannot be forked; then they start as fresh interpreters and do without the warm-up.

    Returns
    -------
    Executor

    Raises
    ------
    SettingsError
        A value is invalid.
    UnknownBackendError
        There is no such backend; the message names those that exist.
    DeviceError
        There is no such device; the message names those that exist.
    BackendUnavailableError
        The package of the backend is missing; the message says how to install it.
    PreloadError
        A module of `preload` cannot be imported.
    """
    given = locals()  # the arguments; if a setting is missing in the signature, the next line fails
    return Executor(
        resolve({option.name: given[option.name] for option in options()}),
        Hooks(initializer, initargs, warmup),
    )
