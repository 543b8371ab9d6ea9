"""Rival methods beside KeepLoRA++: equal rank, steps and data, a learning rate for each, several seeds.

    bash scripts/compare_methods.sh                        the image stream: three methods
    bash scripts/compare_methods.sh --all                  every method and ablation, then the video stream
    bash scripts/compare_methods.sh --only "GPM" "EWC"     these arms of the study
    bash scripts/compare_methods.sh --collect              run nothing; write the results of what is complete

The same command again continues; tables and figures are written anew from all complete runs.
"""

import argparse
from pathlib import Path

from mllm_keeplora.recipes.video import EMBEDDED as VIDEO
from mllm_keeplora.recipes.vqa import EMBEDDED as IMAGE
from mllm_keeplora.studies.methods import Study, jobs_of, load_study, run_study, write_results

from mllm_keeplora.commands.program import command
from mllm_keeplora.distributed.processes import start_processes

STUDIES = {
    Path("recipes/studies/image.yaml"): IMAGE,
    Path("recipes/studies/video.yaml"): VIDEO,
}


def main() -> None:
    """Runs studies as far as they are missing and writes their results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, help="YAML like those of recipes/studies (default: image.yaml)")
    parser.add_argument("--all", action="store_true", help="every method and ablation; both shipped studies")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms of the study")
    parser.add_argument("--collect", action="store_true", help="run nothing, write results of complete runs")
    arguments = parser.parse_args()
    with command():
        shipped = list(STUDIES) if arguments.all else list(STUDIES)[:1]
        for path in [arguments.study] if arguments.study else shipped:
            study = load_study(path)
            if not arguments.collect:
                _run(study, path, arguments)
            print(write_results(study))
            print(f"results: {study.results}")


def _run(study: Study, path: Path, arguments: argparse.Namespace) -> None:
    jobs = jobs_of(study, arguments.all, arguments.only)
    start_processes(cpu=False)
    if path in STUDIES:
        STUDIES[path].build()
    run_study(study, jobs)


if __name__ == "__main__":
    main()
