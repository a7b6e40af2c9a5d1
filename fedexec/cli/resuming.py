"""``--checkpoint`` and ``--resume``: where a run writes its state, and from where it goes on."""

import argparse
from pathlib import Path

from fedexec import files
from fedexec.cli.options import UsageError
from fedexec.flower import Round, checkpoint
from fedexec.flower.checkpoint import Checkpoint
from fedexec.workload import jobs
from fedexec.workload.data import DataSpec

__all__ = ["Resuming"]

_SAME = ("epochs", "batch_size", "learning_rate", "fit_clients", "evaluate_clients", "available_clients")


class Resuming:
    """The checkpoints of one run.

    Parameters
    ----------
    arguments : argparse.Namespace
    data : DataSpec

    Attributes
    ----------
    last : Checkpoint or None
        What the run goes on from.

    Raises
    ------
    UsageError
        Nothing that makes sense was asked for; another run's state lies there.
    CheckpointError
        What lies there cannot be read.
    """

    def __init__(self, arguments: argparse.Namespace, data: DataSpec) -> None:
        self._directory = None if arguments.checkpoint is None else Path(arguments.checkpoint)
        self._settings = {name: getattr(arguments, name) for name in _SAME}
        for name, value in data.as_dict().items():
            if name not in ("directory", "download"):  # the data may have been moved
                self._settings["data" if name == "name" else name] = value
        for name in ("fit_clients", "available_clients"):
            self._settings[name] = self._settings[name] or data.clients
        self.last: Checkpoint | None = None
        if self._directory is None:
            if arguments.resume:
                raise UsageError("--resume needs --checkpoint DIR: where the state lies")
            return
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            files.attempt(self._directory / "round.npz")
            found = checkpoint.latest(self._directory)
        except files.UnwritableError as exc:
            raise UsageError(f"--checkpoint {exc}") from exc
        except OSError as exc:
            raise UsageError(f"--checkpoint {self._directory}: {exc.strerror}") from exc
        if found is None:
            return
        held = f"--checkpoint {self._directory} holds round {found.server_round} of a run"
        if not arguments.resume:
            raise UsageError(f"{held}: add --resume to go on from it, or name another directory")
        for name, value in self._settings.items():
            if found.settings.get(name) != value:
                raise UsageError(
                    f"{held} with {name}={found.settings.get(name)}; this one has {name}={value}"
                )
        if found.server_round >= arguments.rounds:
            raise UsageError(f"{held}, which is all: raise --rounds to go on")
        self.last = found

    @property
    def rounds(self) -> list[Round]:
        """Return the rounds that are done."""
        return [] if self.last is None else [Round(**row) for row in self.last.rounds]

    def save(self, rounds: list[Round], weights: jobs.Weights) -> None:
        """Write the state after the last of `rounds`."""
        if self._directory is not None:
            rows = [each.as_dict() for each in rounds]
            state = Checkpoint(rounds[-1].server_round, weights, rows, self._settings)
            with files.explained(self._directory):
                checkpoint.save(self._directory, state)
