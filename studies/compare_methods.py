"""Rival methods beside KeepLoRA++: equal rank, steps and data, a learning rate for each, several seeds.

    python -m mllm_keeplora.studies.compare_methods                        the image stream: three methods
    python -m mllm_keeplora.studies.compare_methods --all                  all methods, ablations and video
    python -m mllm_keeplora.studies.compare_methods --only "GPM" "EWC"     these arms of the study
    python -m mllm_keeplora.studies.compare_methods --collect              run nothing, write the results

The same command again continues; tables and figures are written anew from all complete runs.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.command_line import OptionParser, command

STUDIES = ("recipes/studies/image.yaml", "recipes/studies/video.yaml")


def main(argv: Sequence[str]) -> None:
    """Makes the runs of a study that are missing and writes its results."""
    parser = OptionParser("python -m mllm_keeplora.studies.compare_methods", __doc__)
    parser.add_argument("--study", type=Path, help="YAML like those of recipes/studies (default: image.yaml)")
    parser.add_argument("--all", action="store_true", help="every method and ablation; both shipped studies")
    parser.add_argument("--only", nargs="+", default=[], metavar="ARM", help="these arms of the study")
    parser.add_argument("--collect", action="store_true", help="run nothing, write results of complete runs")
    given = parser.read(argv)

    from mllm_keeplora.recipes.small.streams import build_small_base, draw_small_stream
    from mllm_keeplora.studies.methods import config_of, jobs_of, load_study, run_study
    from mllm_keeplora.studies.results import write_results

    shipped = STUDIES if given.all else STUDIES[:1]
    for path in [given.study] if given.study else shipped:
        study = load_study(Path(path))
        if not given.collect:
            jobs = jobs_of(study, given.all, given.only)
            config = config_of(study, study.reference, {})
            draw_small_stream(config.stream, config.data_root)
            build_small_base(config.model.base_model)
            run_study(study, jobs)
        print(f"{write_results(study)}\nresults: {study.results}")


if __name__ == "__main__":
    with command():
        main(sys.argv[1:])
