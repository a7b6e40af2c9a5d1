"""``--checkpoint`` and ``--resume``: where a run writes its state, and from where it goes on."""

import argparse
from pathlib import Path

from fedexec._cli.options import UsageError
from fedexec._system import files
from fedexec._workload import jobs
from fedexec._workload.data import DataSpec
from fedexec.flower import Round
from fedexec.flower.grpc.checkpoint import Checkpoint, Checkpoints

__all__ = ["Resuming"]

_SAME = ("epochs", "batch_size", "learning_rate", "fit_clients", "evaluate_clients", "available_clients")


class Resuming:
    """The checkpoints of one run, whose directory is this run's until the context ends.

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
        What lies there cannot be read, or another run uses the directory.
    """

    def __init__(self, arguments: argparse.Namespace, data: DataSpec) -> None:
        self._checkpoints: Checkpoints | None = None
        self._settings = {name: getattr(arguments, name) for name in _SAME}
        for name, value in data.as_dict().items():
            if name not in ("directory", "download"):  # the data may have been moved
                self._settings["data" if name == "name" else name] = value
        for name in ("fit_clients", "available_clients"):
            self._settings[name] = self._settings[name] or data.clients
        self.last: Checkpoint | None = None
        self._saved: int | None = None
        if arguments.checkpoint is None:
            if arguments.resume:
                raise UsageError("--resume needs --checkpoint DIR: where the state lies")
            return
        directory = Path(arguments.checkpoint)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            files.attempt(directory / "round.npz")
            self._checkpoints = Checkpoints(directory)
            self.last = self._checkpoints.latest()
            if self.last is not None:
                self._saved = self.last.server_round
                self._check(arguments, self.last, f"--checkpoint {directory} holds round")
        except files.UnwritableError as exc:
            self.close()
            raise UsageError(f"--checkpoint {exc}") from exc
        except (FileExistsError, NotADirectoryError) as exc:
            self.close()
            raise UsageError(f"--checkpoint {directory} is no directory, and it must be one") from exc
        except OSError as exc:
            self.close()
            raise UsageError(f"--checkpoint {directory}: {exc.strerror}") from exc
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another run use the directory."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    def advice(self) -> str | None:
        """Tell who has ended the run how to go on with it; None if nothing was saved."""
        if self._saved is None or self._checkpoints is None:
            return None
        directory = self._checkpoints.directory
        return f"{directory} holds round {self._saved}: the same command with --resume goes on from it"

    @property
    def rounds(self) -> list[Round]:
        """Return the rounds that are done."""
        return [] if self.last is None else self.last.rounds

    def save(self, rounds: list[Round], weights: jobs.Weights) -> None:
        """Write the state after the last of `rounds`."""
        if self._checkpoints is not None:
            number = rounds[-1].server_round
            with files.explained(self._checkpoints.directory):
                self._checkpoints.save(Checkpoint(number, weights, rounds, self._settings))
            self._saved = number

    def _check(self, arguments: argparse.Namespace, found: Checkpoint, held: str) -> None:
        """Raise UsageError if this run cannot go on from that state."""
        held = f"{held} {found.server_round} of a run"
        if not arguments.resume:
            raise UsageError(f"{held}: add --resume to go on from it, or name another directory")
        for name, value in self._settings.items():
            if found.settings.get(name) != value:
                raise UsageError(
                    f"{held} with {name}={found.settings.get(name)}; this one has {name}={value}"
                )
        if found.server_round >= arguments.rounds:
            raise UsageError(f"{held}, which is all: raise --rounds to go on")
