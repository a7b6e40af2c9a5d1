"""The command line that scripts with several comparisons share."""

import argparse
from collections.abc import Callable, Mapping

Comparison = Callable[[int], bool]


def run_comparisons(description: str, comparisons: Mapping[str, Comparison], repeat: int) -> int:
    """Print the comparisons that the command line asks for.

    Parameters
    ----------
    description : str
    comparisons : mapping of str to callable
        Takes how many runs to make the median of, and returns whether what is promised was kept. Its
        docstring is its title.
    repeat : int
        How many runs, if the command line does not say.

    Returns
    -------
    int
        An exit code: 1 if something is not as promised.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--only", choices=comparisons, help="one comparison")
    parser.add_argument(
        "--repeat", type=int, default=repeat, metavar="N", help=f"median of N runs (default {repeat})"
    )
    arguments = parser.parse_args()
    kept = True
    for name, compare in comparisons.items():
        if arguments.only in (None, name):
            print(f"\n{compare.__doc__}")
            kept &= compare(arguments.repeat)
    return 0 if kept else 1
