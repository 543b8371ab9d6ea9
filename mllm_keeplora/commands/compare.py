"""Puts finished runs over one stream side by side: a page, a picture, a table.

Runs of one method that differ in the seed alone are averaged.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Writes the page and the picture, and prints the table.

    Raises:
        KeepLoRAError: a run that is missing, damaged or unfinished, or runs that do not compare.
    """
    parser = argparse.ArgumentParser(prog="keeplora compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", help="directories of finished runs over one stream")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/comparison"), help="directory (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)

    from mllm_keeplora.reports.comparison import PAGE, PICTURE, compare_runs, format_comparison

    groups = compare_runs(arguments.runs, arguments.out)
    print(
        format_comparison(groups),
        f"\npage: {arguments.out / PAGE}\npicture: {arguments.out / PICTURE}",
        sep="\n",
    )
