"""Grades a run's saved replies by a judge model, as CL-VISTA's published scores are given.

    keeplora judge runs/video_cl_vista --judge Qwen/Qwen3-30B-A3B-Instruct-2507

The judge reads question, reference answer and reply, and grades each reply from 0 to 5; a task's score is the
mean grade times 20. That judge's 30.5 billion weights of 2 bytes need 57 GiB of GPU memory: judging is a step
of its own because judge and trained model rarely fit one GPU together.

The run's own scores stay as they are; RUN/judged.json has the form of its retention.json. Interrupted, the
same command continues: verdicts are kept in RUN/judge/ by what was judged and by whom.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import JudgeConfig
from mllm_keeplora.settings import build


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = OptionParser("keeplora judge", __doc__, "RUN --judge MODEL")
    parser.add_argument("run", type=Path, help="directory of a run that is at its end")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks to judge (default: all of the stream)")
    parser.add_settings(JudgeConfig)
    given = parser.read(argv)
    config = build(JudgeConfig, vars(given))

    from mllm_keeplora.continual.saved_run import load_run
    from mllm_keeplora.evaluation.judge import judge_run

    run = load_run(given.run).directory
    judged = judge_run(run.path, config, given.tasks)
    print(f"{format_judged(judged)}\njudged: {run.judged}")


def format_judged(judged: Mapping[str, Any]) -> str:
    """The table of the report, and what could not be read of the judge."""
    from mllm_keeplora.reports.tables import format_table

    lines = [format_table(judged), "", f"judge: {judged['judge']['judge']}, mean grade of 0..5 times 20"]
    for task, counts in judged["parse_failures"].items():
        if counts["of"]:
            lines.append(f"unreadable verdicts, scored 0: {task} {counts['failed']} of {counts['of']}")
    return "\n".join(lines)
