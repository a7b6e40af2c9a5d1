"""What is kept of a worker's stderr."""

from fedexec._channel import stderr

STACK = "".join(f'  File "task.py", line {number} in function_{number}\n' for number in range(30))
C_STACK = "".join(f'  Binary file "/usr/bin/python3", at +{number:#x} [0x7f47]\n' for number in range(32))
REPORT = (
    "Fatal Python error: Segmentation fault\n\n"
    f"Current thread 0x7f47 [python3] (most recent call first):\n{STACK}\n"
)


def test_of_a_fatal_signal_its_name_and_the_stack_of_python_are_kept():
    extensions = "Extension modules: numpy._core (total: 1)"
    written = REPORT + f"Current thread's C stack trace (most recent call first):\n{C_STACK}\n" + extensions
    assert stderr.last_lines("before\n" * 3 + written) == "before\n" * 3 + REPORT + extensions


def test_the_name_of_a_fatal_signal_is_kept_however_many_threads_there_are():
    others = "".join(f"Thread {number:#x} (most recent call first):\n{STACK}" for number in range(9))
    first, *_, last = kept = stderr.last_lines("before\n" * 100 + REPORT + others).splitlines()
    assert (first, last) == ("Fatal Python error: Segmentation fault", STACK.splitlines()[-1])
    assert len(kept) == stderr.KEPT_LINES


def test_of_much_that_is_written_the_last_lines_are_kept():
    kept = stderr.last_lines("".join(f"{number}\n" for number in range(100)))
    assert kept.splitlines() == [str(number) for number in range(60, 100)]
