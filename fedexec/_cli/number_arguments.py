"""How the command line reads numbers, each with its bounds."""

import argparse
from collections.abc import Callable

__all__ = ["MOST_CLIENTS", "above_zero", "clients", "count", "positive"]

LARGEST = 2**63 - 1  # of the numbers that Flower can send
MOST_CLIENTS = 1_000_000
"""Clients or nodes: each has a record in this process."""


def _number(
    kind: Callable[[str], float], minimum: float, maximum: float = LARGEST, *, exclusive: bool = False
) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not (value > minimum if exclusive else value >= minimum) or value == float("inf"):
            raise argparse.ArgumentTypeError(
                f"must be {'greater than' if exclusive else 'at least'} {minimum:g}, got {text}"
            )
        if value > maximum:
            bound = "2**63 - 1" if maximum == LARGEST else f"{maximum:,}"
            raise argparse.ArgumentTypeError(f"must be at most {bound}, got {text}")
        return value

    read.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return read


positive = _number(int, 1)
count = _number(int, 0)
clients = _number(int, 1, MOST_CLIENTS)
above_zero = _number(float, 0, exclusive=True)
