"""Measures a run's adapter on other tasks of lmms-eval, or an edited adapter on the tasks of its run.

    keeplora evaluate runs/without_charts                           all questions of the run that it was made of
    keeplora evaluate runs/vqa_small --tasks mmstar mme             tasks or groups of lmms-eval, by its names
    keeplora evaluate runs/vqa_small --tasks mine --include_path my_tasks

`python -m lmms_eval --tasks list` lists lmms-eval's tasks. Results and replies stay in RUN/lmms_eval, and those of an
edited adapter in its retention.json, beside the base's.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import Count


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = OptionParser("keeplora evaluate", __doc__)
    parser.add_argument("run", type=Path, help="directory of a run, or of what keeplora edit has made")
    parser.add_argument("--tasks", metavar="TASK", nargs="+", default=[], help="of lmms-eval")
    parser.add_setting("limit", Count, "first questions of each of --tasks (default: all)", default=None)
    parser.add_argument("--include_path", type=Path, help="folder of task files of one's own")
    given = parser.read(argv)

    from mllm_keeplora.continual.evaluating import evaluate
    from mllm_keeplora.continual.saved_run import load_run
    from mllm_keeplora.reports.card import write_card
    from mllm_keeplora.reports.tables import format_numbers, format_table

    run = load_run(given.run)
    found = evaluate(run, given.tasks, limit=given.limit, include_path=given.include_path)
    if given.tasks:
        print(f"{format_numbers(found)}\nreplies: {run.directory.other_tasks}")
        return
    measured = load_run(given.run)
    write_card(measured)
    print(f"{format_table(found)}\nreplies: {measured.directory.edit_replies}")
