"""Rival methods beside KeepLoRA++: equal rank, steps and data, a learning rate for each, several seeds.

    python -m mllm_keeplora.studies.compare_methods                    the image stream: three methods
    python -m mllm_keeplora.studies.compare_methods --all              every method and ablation; then video
    python -m mllm_keeplora.studies.compare_methods --only GPM EWC     these arms of the study
    python -m mllm_keeplora.studies.compare_methods --collect          results of complete runs; nothing runs

The same command again continues; tables and figures are written anew from all complete runs.
"""

import argparse
from pathlib import Path

from mllm_keeplora.recipes.video import EMBEDDED as VIDEO
from mllm_keeplora.recipes.vqa import EMBEDDED as IMAGE
from mllm_keeplora.studies.methods import config_of, jobs_of, load_study, run_study
from mllm_keeplora.studies.results import write_results

from mllm_keeplora.commands.program import command

SHIPPED = (Path("recipes/studies/image.yaml"), Path("recipes/studies/video.yaml"))


def main() -> None:
    """Makes the runs of a study that are missing and writes its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--study", type=Path, help="YAML like those of recipes/studies (default: image.yaml)")
    parser.add_argument("--all", action="store_true", help="every method and ablation; both shipped studies")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms of the study")
    parser.add_argument("--collect", action="store_true", help="run nothing, write results of complete runs")
    arguments = parser.parse_args()
    with command():
        for path in [arguments.study] if arguments.study else SHIPPED if arguments.all else SHIPPED[:1]:
            study = load_study(path)
            if not arguments.collect:
                jobs = jobs_of(study, arguments.all, arguments.only)
                for small in (IMAGE, VIDEO):
                    if Path(config_of(study, study.reference, {}).stream) == small.stream:
                        small.build()
                run_study(study, jobs)
            print(f"{write_results(study)}\nresults: {study.results}")


if __name__ == "__main__":
    main()
