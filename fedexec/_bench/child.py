"""The process that one part is measured in: ``python -m fedexec._bench.child``. See running.py.

What a part leaves behind in its process, or breaks, no other part sees. The process gets a line of JSON: the
part, and the state that another process has left it in. It says "." and its state when it waits for its turn,
and goes on when a byte comes; in the end it says what it measured.
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
from fedexec._bench.plan import Part, State
from fedexec._bench.session import Session
from fedexec._bench.stats import statistics_of
from fedexec._report.schema import KEY
from fedexec._system.error_text import one_line

__all__ = ["benchmark_of", "main"]


def main() -> None:
    """Read a part and its state from stdin; write the benchmark to where stdout was."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not the answer
    given = json.loads(_line())
    turns = threading.Semaphore(0)
    threading.Thread(target=_listen, args=(turns,), daemon=True).start()

    def turn(state: State | None) -> None:
        answer.write(f".{json.dumps(state)}\n")
        answer.flush()
        turns.acquire()

    try:
        content: dict[str, Any] = benchmark_of(Part.from_dict(given["part"]), turn, given["state"])
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as exc:
        content = {"error": one_line(exc)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends anyway, and cleans up undisturbed
    json.dump(content, answer)
    answer.close()


def benchmark_of(
    part: Part, turn: Callable[[State | None], object], state: State | None = None
) -> dict[str, Any]:
    """Measure a part.

    Parameters
    ----------
    part : Part
    turn : callable
        Called before all that works, with the part's state; returns when it is this part's turn.
    state : dict, optional
        Where an earlier process has left off. Warm-ups are done again.

    Returns
    -------
    dict
        The benchmark, as pytest-benchmark writes it.
    """
    seconds = [] if state is None else list(state["seconds"])
    with open_session(part) as session:
        if state is not None:
            session.go_on(state["noted"])
        for number in range(part.warmup_rounds + part.rounds - len(seconds)):
            turn(_state(session, seconds))
            session.setup()
            began = time.perf_counter()
            session.call()
            if number >= part.warmup_rounds:
                seconds.append(time.perf_counter() - began)
        turn(_state(session, seconds))
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


def _state(session: Session, seconds: list[float]) -> State | None:
    """Return what another process needs to go on; None if it has to begin anew."""
    noted = session.noted() if seconds else None
    return None if noted is None else {"seconds": seconds, "noted": noted}


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
