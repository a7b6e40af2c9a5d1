"""How long what is left may take: guessed from what is known of a part, corrected by what others took."""

from collections.abc import Sequence

from fedexec._bench.peers import contestants
from fedexec._bench.plan import Part
from fedexec._bench.workloads import BUILT_IN

__all__ = ["Estimate", "usual_seconds"]

IMPORTS = {"torch": 3.5, None: 0.7}  # seconds until a worker has imported what it needs
COMPUTE = {"cnn": 0.6, "cnn-short": 0.03, "resnet18": 0.5, "numpy": 0.05}  # seconds a client
OF_OTHERS = 1.0  # of a function that nothing is known of
CALL = 0.15  # a pause, and a task that does nothing


class Estimate:
    """What a machine needs of the usual seconds, learned part by part."""

    def __init__(self) -> None:
        self._usual = self._took = 0.0

    def add(self, parts: Sequence[Part], seconds: float) -> None:
        """Learn what some parts took together."""
        self._usual += sum(map(usual_seconds, parts))
        self._took += seconds

    def seconds(self, parts: Sequence[Part]) -> float:
        """Return what these may take."""
        return sum(map(usual_seconds, parts)) * (self._took / self._usual if self._usual else 1.0)


def usual_seconds(part: Part) -> float:
    """Guess what a part takes on a machine as they are, its process and its executor included."""
    job = BUILT_IN.get(part.workload)
    compute = OF_OTHERS if job is None else COMPUTE[part.workload]
    begin = IMPORTS["torch" if job is not None and "torch" in job.needs else None]
    each = begin if contestants()[part.strategy].slow else 0.0  # imported again for each task
    rounds = part.rounds + part.warmup_rounds
    if part.group == "start-up":
        return rounds * (begin + CALL) if part.variant == "cold" else begin + rounds * (each + CALL)
    if not part.computes:  # a handful of short tasks a round
        return begin + rounds * (each * part.clients / part.workers + 3 * CALL)
    if part.group == "footprint" and job is not None and job.charges:
        compute *= 2
    clients = rounds * part.clients / part.workers + (2 + part.rounds / 3 if part.group == "round" else 0)
    return begin + clients * (compute + each)
