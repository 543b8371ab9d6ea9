"""Grades a run's saved replies by a judge model, as CL-VISTA's published scores are given.

    keeplora judge runs/video_cl_vista --judge Qwen/Qwen3-30B-A3B-Instruct-2507

The judge reads question, reference answer and reply, and grades each reply from 0 to 5; a task's score is the
mean grade times 20. That judge's 30.5 billion weights of 2 bytes need 57 GiB of GPU memory: judging is a step
of its own because judge and trained model rarely fit one GPU together.

The run's own scores stay as they are; RUN/judged.json has the form of its retention.json. Interrupted, the
same command continues: verdicts are kept in RUN/judge/ by what was judged and by whom.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mllm_keeplora.command_line import read_settings, settings_parser
from mllm_keeplora.config import JudgeConfig
from mllm_keeplora.runs.run_directory import RunDirectory


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = settings_parser("keeplora judge", __doc__, "RUN --judge MODEL")
    parser.add_argument("run", type=str, help="directory of a run that is at its end")
    parser.add_argument("--tasks", nargs="+", type=str, help="tasks to judge (default: all of the stream)")
    parser.add_class_arguments(JudgeConfig)
    given = read_settings(parser, argv)

    from mllm_keeplora.evaluation.judge import judge_run

    config = JudgeConfig(**{f.name: getattr(given, f.name) for f in fields(JudgeConfig)})
    judged = judge_run(Path(given.run), config, given.tasks)
    print(f"{format_judged(judged)}\njudged: {RunDirectory(Path(given.run)).judged}")


def format_judged(judged: Mapping[str, Any]) -> str:
    """The table of the report, and what could not be read of the judge."""
    from mllm_keeplora.reports.tables import format_table

    lines = [format_table(judged), "", f"judge: {judged['judge']['judge']}, mean grade of 0..5 times 20"]
    for task, counts in judged["parse_failures"].items():
        if counts["of"]:
            lines.append(f"unreadable verdicts, scored 0: {task} {counts['failed']} of {counts['of']}")
    return "\n".join(lines)
