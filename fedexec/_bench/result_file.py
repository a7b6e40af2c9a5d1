"""The file that `fedexec bench` writes: pytest-benchmark's JSON, whole after every round, to go on from."""

import datetime as dt
import hashlib
import json
import os
import subprocess
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeGuard

from fedexec._bench import machine
from fedexec._bench.plan import MODES, Part, State
from fedexec._bench.workloads import OwnTask
from fedexec._report.gpu import GpuRun
from fedexec._report.reading import UnreadableError, read
from fedexec._report.schema import KEY, Course
from fedexec._system import files
from fedexec.errors import FedexecError

__all__ = ["Document", "OtherRunError"]

VERSION = "5.1.0"  # of pytest-benchmark, whose file this is like
UNFINISHED = "fedexec-unfinished"  # name of a benchmark to its State


class OtherRunError(FedexecError, ValueError):
    """The file is of another run than the one that is to go on; the message says what differs."""


class Document:
    """What has been measured so far.

    Parameters
    ----------
    path : Path
    mode : str
    parts : list of Part
        What is to be measured.
    missing : mapping of str to str
        Who does not take part, and why.
    """

    def __init__(self, path: Path, mode: str, parts: list[Part], missing: Mapping[str, str]) -> None:
        self._commit = _commit()
        self._inputs = _inputs(parts[0].own, self._commit)
        assert mode in MODES
        self.path, self.mode, self._missing = path, mode, dict(missing)
        self._names = [part.name for part in parts]
        self._benchmarks: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, str] = {}
        self._states: dict[str, State] = {}

    def go_on(self) -> int:
        """Take over what the file holds already; return how many benchmarks those are.

        Raises
        ------
        OtherRunError
            It is no file of this tool, or of another mode, machine, or version.
        """
        if not self.path.exists():
            return 0
        advice = "name another file with --json, or delete it"
        try:
            run = read(self.path)
        except UnreadableError as exc:
            raise OtherRunError(f"{exc}; {advice}") from exc
        if (
            isinstance(run, GpuRun)
            or run.course is None
            or run.course.mode != self.mode
            or run.course.planned != self._names
        ):
            raise OtherRunError(f"{self.path} is of another kind of run; {advice}")
        changed = [name for name, value in self._inputs.items() if run.course.inputs.get(name) != value]
        if changed:
            raise OtherRunError(f"{self.path} was measured with other {' and '.join(changed)}; {advice}")
        for one in run.measurements:
            if one.record.machine != machine.fingerprint():
                raise OtherRunError(f"{self.path} is of another machine, {one.record.cpu}; {advice}")
            if one.record.versions != machine.versions():
                raise OtherRunError(f"{self.path} was measured with other versions; {advice}")
        content = json.loads(self.path.read_text(encoding="utf-8"))
        self._benchmarks = {one["name"]: one for one in content["benchmarks"]}
        states = content.get(UNFINISHED)
        for name in self._names if isinstance(states, dict) else ():
            if name not in self._benchmarks and _is_state(states.get(name)):
                self._states[name] = states[name]
        return len(self._benchmarks)

    @property
    def is_begun(self) -> bool:
        """Whether anything has been measured."""
        return bool(self._benchmarks or self._failed or self._states)

    def state(self, part: Part) -> State | None:
        """Return where a part that was begun goes on; None if it begins anew."""
        return self._states.get(part.name)

    def keep(self, part: Part, state: State | None) -> None:
        """Note how far a part is; :meth:`write` saves it."""
        if state is not None:
            self._states[part.name] = state

    def has(self, part: Part) -> bool:
        """Whether a part has been measured."""
        return part.name in self._benchmarks

    def add(self, part: Part, benchmark: dict[str, Any]) -> None:
        """Keep a part's benchmark, or its error."""
        self._states.pop(part.name, None)
        if "error" in benchmark:
            self._failed[part.name] = benchmark["error"]
        else:
            self._failed.pop(part.name, None)
            self._benchmarks[part.name] = benchmark
        self.write()

    @property
    def failed(self) -> dict[str, str]:
        """Names of parts, and their errors."""
        return dict(self._failed)

    def write(self) -> None:
        """Write the file in one go: it is never half."""
        course = Course(
            mode=self.mode,
            planned=self._names,
            failed=self._failed,
            missing=self._missing,
            inputs=self._inputs,
        )
        content = {
            "machine_info": machine.info(),
            "commit_info": self._commit,
            "benchmarks": [self._benchmarks[name] for name in self._names if name in self._benchmarks],
            "datetime": dt.datetime.now(dt.UTC).isoformat(),
            "version": VERSION,
            KEY: course.as_dict(),
            **({UNFINISHED: self._states} if self._states else {}),
        }
        files.write(self.path, (json.dumps(content) + "\n").encode())


def _is_state(found: object) -> TypeGuard[State]:
    """Return whether a process can go on from what a file holds."""
    if not isinstance(found, dict) or not isinstance(found.get("noted"), dict):
        return False
    seconds = found.get("seconds")
    return isinstance(seconds, list) and all(isinstance(value, float) for value in seconds)


def _inputs(own: OwnTask | None, commit: Mapping[str, Any]) -> dict[str, str]:
    """Return what the figures depend on; values of the environment may be secret, so only its fingerprint."""
    environment = sorted(f"{name}={value}" for name, value in os.environ.items() if "FEDEXEC" in name)
    found = {"settings (FEDEXEC_...)": _fingerprint("\n".join(environment)), "code": commit["id"]}
    if own is not None:
        found |= {
            "arguments": own.arguments or "",
            "source": _fingerprint("".join(map(_source, own.modules))),
        }
    return found


def _source(module: str) -> str:
    file = import_module(module).__file__
    return Path(file).read_text(encoding="utf-8", errors="replace") if file else ""


def _fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _commit() -> dict[str, Any]:
    """Return which commit is measured, where this is a checkout."""
    directory = Path(__file__).parents[2]
    if not (directory / ".git").exists():
        return {"id": "unknown", "dirty": False}
    git = ["git", "-C", os.fspath(directory)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return {"id": "unknown", "dirty": False}
    return {"id": found.stdout.strip(), "dirty": bool(changed.stdout.strip())}
