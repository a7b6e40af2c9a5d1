"""``fedexec supernode``: Flower's SuperNodes on this machine, whose ClientApps start in warm processes."""

import argparse
import contextlib
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping

from fedexec import _registry
from fedexec._cli import options
from fedexec._system.available_resources import available_cores
from fedexec._worker.threads import THREAD_VARIABLES
from fedexec.errors import FedexecError, SettingsError
from fedexec.executor import Executor
from fedexec.flower.supernode import keeper, warm_command
from fedexec.flower.supernode.launch_host import COMMAND, LaunchHost
from fedexec.interface import Capability, Hooks
from fedexec.settings import resolve

__all__ = ["command"]

PROGRAM = "flower-supernode"
LEAVE_SECONDS, LOOK_SECONDS = 10.0, 0.1


def command(arguments: argparse.Namespace) -> int:
    """Run SuperNodes until one of them ends."""
    groups = _groups(arguments.flower)
    program = _program()
    flags = options.executor_flags(arguments)
    # With other numbers of threads than Flower's own launches have, sums would be rounded in another way.
    threads = None if any(name in os.environ for name in THREAD_VARIABLES) else available_cores()
    settings = resolve(flags=flags, config={"max_workers": "auto", "threads_per_worker": threads})
    promises = _registry.load_chosen(settings).capabilities
    if Capability.FRESH_PROCESS not in promises or Capability.REMOTE in promises:
        raise SettingsError(
            f"backend {settings.backend!r} ({settings.given_by('backend')}) does not run each task in a "
            "fresh process of this machine, which Flower's command needs"
        )
    most = "as memory allows" if settings.auto else settings.max_workers
    print(
        f"fedexec: {len(groups)} SuperNode(s), backend {settings.backend}, at once: {most}; warming up",
        file=sys.stderr,
        flush=True,
    )
    hooks = Hooks(warmup=functools.partial(warm_command.warm, COMMAND))
    with Executor(settings, hooks) as executor, LaunchHost(executor) as host:
        supernodes: list[subprocess.Popen[bytes]] = []

        def stop() -> None:
            _end(supernodes)
            executor.kill_workers()

        arguments.ending.prepare(stop=stop)
        for group in groups:
            supernodes.append(_start(program, group, host.variables))
        while all(each.poll() is None for each in supernodes):
            time.sleep(LOOK_SECONDS)
        code = next(each.returncode for each in supernodes if each.returncode is not None)
        stop()
        arguments.ending.settle()
    return code if code >= 0 else 128 - code  # negative if a keeper was killed


def _groups(words: list[str]) -> list[list[str]]:
    """Return the arguments of each SuperNode; ``--`` stands between them."""
    groups: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            groups.append([])
        else:
            groups[-1].append(word)
    found = [group for group in groups if group]
    if not found:
        raise options.UsageError(
            "write the arguments of flower-supernode after --, for example: "
            "fedexec supernode -- --insecure --superlink 127.0.0.1:9092"
        )
    return found


def _program() -> str:
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(PROGRAM, path=places)
    if found is None:
        raise FedexecError(f"there is no {PROGRAM}: pip install 'fedexec[flower]'")
    return found


def _start(program: str, words: list[str], variables: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    keeping = [sys.executable, "-I", "-S", keeper.__file__, str(os.getpid())]
    return subprocess.Popen([*keeping, program, *words], env={**os.environ, **variables})


def _end(supernodes: "list[subprocess.Popen[bytes]]") -> None:
    """End the SuperNodes, first with a signal that lets them say goodbye to their SuperLink."""
    for each in supernodes:
        with contextlib.suppress(ProcessLookupError):
            each.terminate()
    end = time.monotonic() + LEAVE_SECONDS
    for each in supernodes:
        try:
            each.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            each.kill()
            each.wait()
