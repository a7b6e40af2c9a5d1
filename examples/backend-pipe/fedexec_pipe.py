"""A backend of a third party: a new process for each task, its reply over a pipe."""

import functools
import multiprocessing
from multiprocessing.connection import Connection

from fedexec.backend import (
    Capability,
    IsolatingBackend,
    Outcome,
    Task,
    WorkerDiedError,
    WorkerSetup,
    end_process,
    exit_code,
    receive,
    run,
    setup,
)


class PipeBackend(IsolatingBackend):
    """Starts a process, and waits for its reply or its end."""

    capabilities = (
        Capability.ISOLATED
        | Capability.FRESH_PROCESS
        | Capability.SURVIVES_DEATH
        | Capability.KILLS_ONE
        | Capability.SHARES_MEMORY
    )
    descriptors_per_worker = 10

    def run(self, task: Task) -> Outcome:
        """Run one task in one process."""
        return self.channel.deliver(task, functools.partial(self._call, task))

    def _call(self, task: Task, message: bytes) -> bytes:
        ours, theirs = multiprocessing.Pipe(duplex=False)
        worker = self.context.Process(target=_work, args=(self.worker_setup, theirs, message))
        with ours, theirs:
            worker.start()
            theirs.close()  # The worker has the only writing end now: its death ends the pipe.
            with self.running(task, worker):
                try:
                    return receive(ours, worker)
                except (EOFError, OSError):
                    end_process(worker)  # It may have closed its end and live on.
                    worker.join()
                    raise WorkerDiedError(worker.pid, exit_code(worker), task.name) from None
                finally:
                    worker.join()


def _work(worker_setup: WorkerSetup, reply: Connection, message: bytes) -> None:
    setup(worker_setup)
    reply.send_bytes(run(message))
