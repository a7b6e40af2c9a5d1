"""What no backend has a part in."""

import threading

import pytest

import fedexec
from fedexec.testing.tasks import DEADLINE


def test_ctrl_c_while_a_slot_is_opened_is_not_lost_nor_is_the_slot(monkeypatch):
    gate = threading.Event()
    executor = fedexec.create_executor("inline", max_workers=2)
    first = executor.submit(gate.wait, DEADLINE)
    start = threading.Thread.start

    def start_and_be_interrupted(thread):
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_be_interrupted)
        with pytest.raises(KeyboardInterrupt):
            executor.submit(pow, 2, 3)
    assert executor.submit(pow, 2, 3).result(DEADLINE) == 8  # by the second slot: the first is busy
    gate.set()
    assert first.result(DEADLINE)
    executor.shutdown()
    assert executor.stats().succeeded == 3


def test_a_slot_that_cannot_be_opened_leaves_the_task_to_the_others(monkeypatch):
    with fedexec.create_executor("inline", max_workers=2) as executor:
        gate = threading.Event()
        first = executor.submit(gate.wait, DEADLINE)

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            second = executor.submit(pow, 2, 3)
        gate.set()
        assert (first.result(DEADLINE), second.result(DEADLINE)) == (True, 8)
