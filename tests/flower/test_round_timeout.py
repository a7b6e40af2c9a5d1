"""How long a client may take to answer, where nobody has said it."""

import pytest

from fedexec._cli import options
from fedexec._cli.commands import make_parser
from fedexec._cli.serving import round_timeout


@pytest.mark.parametrize(
    ("argv", "seconds"),
    [
        ([], None),
        (["--timeout", "10"], 60 + 5 * (10 + 5)),  # ten clients, two at once
        (["--timeout", "10", "--retries", "1"], 60 + 5 * 2 * (10 + 5)),
        (["--timeout", "10", "--fit-clients", "3"], 60 + 2 * (10 + 5)),
        (["--timeout", "10", "--fit-clients", "3", "--evaluate-clients", "8"], 60 + 4 * (10 + 5)),
        (["--timeout", "10", "--max-workers", "auto"], 60 + 10 * (10 + 5)),
        (["--timeout", "10", "--round-timeout", "7"], 7),
        (["--round-timeout", "7"], 7),
    ],
)
def test_how_long_a_round_may_take_follows_from_how_long_a_task_may(argv, seconds):
    arguments = make_parser().read(["run", "--max-workers", "2", *argv])
    settings = options.executor_settings(arguments)
    assert round_timeout(arguments, settings, shared=True) == seconds
    if argv == ["--timeout", "10"]:
        assert round_timeout(arguments, settings, shared=False) == 60 + 10 * (10 + 5)
