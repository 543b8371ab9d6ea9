"""Where a model's knowledge lies: accuracy with weights rebuilt from their principal or residual directions.

    bash scripts/analyze.sh                                    the embedded base: CPU, about 1.5 minutes
    bash scripts/analyze.sh --run runs/vqa_small            a finished run: base plus what it has learnt
    bash scripts/analyze.sh --config recipes/configs/vqa/FILE.yaml --data_root /where/it/is   another base

The same command again continues an interrupted analysis. docs/analysis.md says what is measured.
"""

from pathlib import Path

from mllm_keeplora.recipes.video import EMBEDDED as EMBEDDED_VIDEO
from mllm_keeplora.recipes.vqa import EMBEDDED
from mllm_keeplora.studies.analysis import PICTURE, RESULTS, analyze, format_analysis, parse_analysis

from mllm_keeplora.commands.program import command


def main() -> None:
    """The command line."""
    with command():
        config = parse_analysis(__doc__, EMBEDDED.config)
        for embedded in (EMBEDDED, EMBEDDED_VIDEO):
            if Path(config.stream) == embedded.stream and config.data_root is None:
                embedded.build()
        results = analyze(config)
        print(format_analysis(config, results))
        print(f"\nresults: {Path(config.out) / RESULTS}\npicture: {Path(config.out) / PICTURE}")


if __name__ == "__main__":
    main()
