"""The process that one part is measured in: ``python -m fedexec._bench.child``. See running.py.

What a part leaves behind in its process, or breaks, no other part sees. It says "." when it waits for its
turn, and goes on when a byte comes; in the end it says what it measured.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from fedexec._bench.measurements import open_session
from fedexec._bench.plan import Part
from fedexec._bench.stats import statistics_of
from fedexec._report.schema import KEY
from fedexec._system.error_text import one_line

__all__ = ["benchmark_of", "main"]


def main() -> None:
    """Read a part, a line of JSON, from stdin; write the benchmark to where stdout was."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not the answer
    part = Part.from_dict(json.loads(_line()))
    turns = threading.Semaphore(0)
    threading.Thread(target=_listen, args=(turns,), daemon=True).start()

    def turn() -> None:
        answer.write(".")
        answer.flush()
        turns.acquire()

    try:
        content: dict[str, Any] = benchmark_of(part, turn)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as exc:
        content = {"error": one_line(exc)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends anyway, and cleans up undisturbed
    json.dump(content, answer)
    answer.close()


def benchmark_of(part: Part, turn: Callable[[], object]) -> dict[str, Any]:
    """Measure a part, asking for a turn before all that works; return it as pytest-benchmark writes it."""
    seconds = []
    with open_session(part) as session:
        for number in range(part.warmup_rounds + part.rounds):
            turn()
            session.setup()
            began = time.perf_counter()
            session.call()
            if number >= part.warmup_rounds:
                seconds.append(time.perf_counter() - began)
        turn()
    return {
        "group": part.group,
        "name": part.name,
        "fullname": f"bench/test_bench.py::{part.name}",
        "params": None,
        "param": part.name.partition("[")[2].rstrip("]"),
        "extra_info": {KEY: session.record().as_dict()},
        "options": {"warmup": part.warmup_rounds > 0},
        "stats": statistics_of(seconds),
    }


def _line() -> bytes:
    """Read a line without reading ahead."""
    read = b""
    while not read.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit("no part was given")
        read += byte
    return read


def _listen(turns: threading.Semaphore) -> None:
    """Hear of turns; and end in order when who asked is gone, or wants it."""
    while os.read(0, 1):
        turns.release()
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
