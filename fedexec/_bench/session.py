"""One part while it is measured. pytest and the command time the same :meth:`Session.call`."""

import contextlib
import statistics
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any

from fedexec._bench import machine, tasks
from fedexec._bench.digests import digest
from fedexec._bench.peers import Caller, contestants
from fedexec._bench.plan import Part
from fedexec._bench.workloads import workload
from fedexec._report.schema import THREAD, VARIES, Record
from fedexec._system.available_resources import available_cores
from fedexec._system.environment import environment
from fedexec._worker.threads import THREAD_VARIABLES

__all__ = ["Session"]


class Session(ABC):
    """A context manager. Inside of it :meth:`setup` and :meth:`call` alternate; after it there is a record.

    Parameters
    ----------
    part : Part
    """

    def __init__(self, part: Part) -> None:
        self.part = part
        self.job = workload(part.workload, part.own)
        self.contestant = contestants()[part.strategy]
        self.load = machine.load()
        self.settings: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Session":
        with contextlib.ExitStack() as stack:
            threads = max(1, available_cores() // self.part.workers)
            stack.enter_context(environment(**dict.fromkeys(THREAD_VARIABLES, str(threads))))
            if self.contestant.isolation == THREAD:
                tasks.prepare((), None, threads)
            self.open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._stack.close()
        if kind is None:
            self.closed()

    def open(self, stack: contextlib.ExitStack) -> None:
        """Get ready; what must be undone goes on the stack."""

    def setup(self) -> None:
        """Get ready for another call. Not timed."""

    @abstractmethod
    def call(self) -> None:
        """Do what is timed."""

    def noted(self) -> dict[str, Any] | None:
        """Return what the calls so far have left, as JSON knows it; None if another process cannot go on."""
        return {}

    def go_on(self, noted: dict[str, Any]) -> None:
        """Take over what :meth:`noted` has returned in another process, before the first call."""

    def finish(self) -> None:
        """Look at what the last call left, while everything stands."""

    def closed(self) -> None:
        """Look at what is left when everything is gone."""

    def measured(self) -> dict[str, Any]:
        """Return the fields of the record that this group knows."""
        return {}

    def record(self) -> Record:
        """Return what was measured beside the seconds."""
        part = self.part
        return Record(
            group=part.group,
            strategy=part.strategy,
            isolation=self.contestant.isolation,
            peer=self.contestant.peer,
            variant=part.variant,
            workload=part.workload if part.computes else None,
            prepared=",".join(self.job.preload),
            clients=part.clients,
            workers=part.workers,
            versions=machine.versions(),
            settings=self.settings,
            cpu=machine.cpu(),
            machine=machine.fingerprint(),
            load=self.load,
            **self.measured(),
        )

    def caller(self, stack: contextlib.ExitStack) -> Caller:
        """Open the contestant."""
        made = stack.enter_context(self.contestant.opens(self.job, self.part.workers))
        self.settings = made.settings
        return made


class Rounds(Session):
    """Clients compute, several at once."""

    def open(self, stack: contextlib.ExitStack) -> None:
        """Have every client's arguments ready, and a worker asked once."""
        self._caller = self.caller(stack)
        self._arguments = self.job.arguments(self._caller.call, self.part.clients)
        self._results: list[tasks.Stamped] = []
        self._digests: set[str] = set()
        self._computes: list[float] = []
        self._imports: list[float] = []
        self.out_of_memory = self.clients_run = 0

    def setup(self) -> None:
        """Note what the round before returned."""
        self._note()

    def noted(self) -> dict[str, Any] | None:
        """Return what the rounds so far have returned and needed."""
        self._note()
        return {
            "digests": sorted(self._digests),
            "computes": self._computes,
            "imports": self._imports,
            "tasks": self.clients_run,
            "out_of_memory": self.out_of_memory,
        }

    def go_on(self, noted: dict[str, Any]) -> None:
        """Take these over."""
        self._digests, self._computes = set(noted["digests"]), list(noted["computes"])
        self._imports = list(noted["imports"])
        self.clients_run, self.out_of_memory = noted["tasks"], noted["out_of_memory"]

    def _note(self) -> None:
        if self._results:
            self._digests.add(digest([result.value for result in self._results]))
            self._imports += [result.imports for result in self._results]
            self._computes += [result.computed for result in self._results]
        self._results = []

    def call(self) -> None:
        """Run a round; what does not fit into memory is counted, any other failure is one."""
        submit, fn = self._caller.submit, self.job.fn
        futures = [submit(tasks.stamped, fn, *arguments) for arguments in self._arguments]
        self.clients_run += len(futures)
        for future in futures:
            try:
                self._results.append(future.result())
            except Exception as exc:
                if "out of memory" not in str(exc):
                    raise
                self.out_of_memory += 1

    def finish(self) -> None:
        """Note what the last round returned."""
        self._note()

    def measured(self) -> dict[str, Any]:
        """Return results and compute."""
        found = self._digests.pop() if len(self._digests) == 1 else VARIES if self._digests else None
        return {
            "digest": found,
            "compute_seconds": statistics.median(self._computes) if self._computes else None,
            "import_seconds": statistics.median(self._imports) if self._imports else None,
            "tasks": self.clients_run,
            "out_of_memory": self.out_of_memory,
        }


def pause(seconds: float) -> None:
    """Let what ends end, and what stands by get ready."""
    time.sleep(seconds)
