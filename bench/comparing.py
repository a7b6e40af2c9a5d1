"""The command line shared by scripts with several comparisons."""

import argparse
from collections.abc import Callable, Mapping

Comparison = Callable[[int], bool]


def run_comparisons(description: str, comparisons: Mapping[str, Comparison], repeat: int) -> int:
    """Run the comparisons that the command line selects.

    Parameters
    ----------
    description : str
        Its first line describes the script in ``--help``.
    comparisons : mapping of str to callable
        Each takes the number of runs for the median, and returns whether its promises are kept. Its docstring
        is printed as its title.
    repeat : int
        Default number of runs.

    Returns
    -------
    int
        Exit code: 1 if a promise is broken.
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
