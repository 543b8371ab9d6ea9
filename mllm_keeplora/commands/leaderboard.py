"""Evaluates a run again from its saved files, in a fresh process, and ranks it.

    keeplora leaderboard runs/vqa_small

Through lmms-eval's own command line, every question of the run's tasks and general benchmarks is asked again,
and the scores are compared with the last row of the run's retention.json. lmms-eval's own result files stay
in RUN/leaderboard. A row is added to leaderboard.json and leaderboard.md; a run that is evaluated again
replaces its row, and runs of one name in two folders have a row each. Exit status: 1 where the scores are not those
of the run: in fp32 on a CPU exactly, else within what batches of other sizes explain.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import Count


def main(argv: Sequence[str]) -> int:
    """The command line."""
    parser = OptionParser("keeplora leaderboard", __doc__)
    parser.add_argument("run", type=Path, help="directory of a run that is at its end")
    text = "first questions of each task only: a quick look, no comparison and no row"
    parser.add_setting("limit", Count, text, default=None)
    parser.add_argument("--table", type=Path, default=Path("leaderboard"), help="its directory (default: %(default)s)")
    given = parser.read(argv)

    from mllm_keeplora.eval.leaderboard import (
        add_row,
        build_row,
        evaluate_saved,
        find_differences,
        format_score,
        read_run,
        replies_may_flip,
    )

    run = read_run(given.run)
    scores = evaluate_saved(run, given.limit)
    if given.limit is not None:
        for name, score in scores.items():
            print(f"{name}: {format_score(score)} (first {score['n']} questions)")
        return 0
    flips = replies_may_flip(run.saved.config.model)
    differences = find_differences(run.scores, scores, flips)
    add_row(given.table, build_row(run, scores, equal=not differences))
    if differences:
        print("\n".join(["Scores differ from the run's own evaluation:", *differences]))
    else:
        exact = not flips or not find_differences(run.scores, scores)
        print(
            f"All {len(scores)} scores equal those of the run's own evaluation"
            + ("." if exact else ", within what differing batches explain.")
        )
    print(f"Leaderboard: {given.table / 'leaderboard.md'}")
    return 1 if differences else 0
