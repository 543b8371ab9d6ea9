"""Rival methods beside KeepLoRA++ on one stream: equal rank, steps and data, several seeds.

    bash scripts/compare_methods.sh                                   the default set
    bash scripts/compare_methods.sh --all                             every method and ablation of the study
    bash scripts/compare_methods.sh --only "GPM" "EWC"                these arms
    bash scripts/compare_methods.sh --study recipes/studies/video.yaml

The same command again continues; tables and figures are written anew from all complete runs.
"""

import argparse
import os
from pathlib import Path

from vqa import EMBEDDED

from mllm_keeplora.compare import jobs_of, load_study, run_study, write_results
from mllm_keeplora.console import command
from mllm_keeplora.processes import start_processes
from mllm_keeplora.recipe import ROOT

IMAGE = Path("recipes/studies/image.yaml")


def main() -> None:
    """Runs a study as far as it is missing and writes its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, default=IMAGE, help="YAML of recipes/studies")
    parser.add_argument("--all", action="store_true", help="every method and ablation of the study")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms of the study")
    parser.add_argument("--collect", action="store_true", help="run nothing, write results of complete runs")
    arguments = parser.parse_args()
    os.chdir(ROOT)
    with command():
        study = load_study(arguments.study)
        jobs = [] if arguments.collect else jobs_of(study, arguments.all, arguments.only)
        start_processes(cpu=False)
        EMBEDDED.build()
        run_study(study, jobs)
        print(write_results(study))
        print(f"results: {study.results}")


if __name__ == "__main__":
    main()
