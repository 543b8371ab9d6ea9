"""Puts runs over one stream side by side: a page, a picture, a table.

    keeplora compare runs/vqa_small runs/lora --out runs/comparison

Runs of one method that differ in the seed alone are averaged.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.command_line import OptionParser


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = OptionParser("keeplora compare", __doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="directories of runs that are at their end")
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"), help="directory (default: %(default)s)")
    given = parser.read(argv)

    from mllm_keeplora.reports.comparison import PAGE, PICTURE, compare_runs, format_comparison

    groups = compare_runs(given.runs, given.out)
    print(f"{format_comparison(groups)}\n\npage: {given.out / PAGE}\npicture: {given.out / PICTURE}")
