"""Where a model's knowledge lies: accuracy with weights rebuilt from their principal or residual directions.

    bash scripts/analyze.sh                                   the small default's base: CPU, about 1.5 minutes
    bash scripts/analyze.sh --run runs/vqa_small              a run: its base plus what it has learnt
    bash scripts/analyze.sh --config recipes/configs/vqa/FILE.yaml --data_root /where/it/is   another base

The same command again continues an interrupted analysis. docs/analysis.md says what is measured.
"""

import sys
from pathlib import Path

from mllm_keeplora.recipes.video import EMBEDDED as VIDEO
from mllm_keeplora.recipes.vqa import EMBEDDED as IMAGE
from mllm_keeplora.studies.analysis import PICTURE, RESULTS, analyze, format_analysis, parse_analysis

from mllm_keeplora.commands.program import command, with_dashes


def main() -> None:
    """The command line."""
    with command():
        config = parse_analysis(with_dashes(sys.argv[1:]), __doc__)
        for small in (IMAGE, VIDEO):
            if Path(config.stream) == small.stream and config.data_root is None:
                small.build()
        results = analyze(config)
        out = Path(config.out)
        print(f"{format_analysis(config, results)}\n\nresults: {out / RESULTS}\npicture: {out / PICTURE}")


if __name__ == "__main__":
    main()
