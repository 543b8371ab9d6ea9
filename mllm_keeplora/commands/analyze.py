"""Shows where a model's knowledge lies: its accuracy with parts of its weights alone.

    keeplora analyze                          the small default's base: CPU, about 1.5 minutes
    keeplora analyze --run runs/vqa_small     a run: its base plus what it has learnt
    keeplora analyze --config recipes/configs/vqa/FILE.yaml --data_root /where/it/is   another base

Weights are rebuilt from a part of their principal or residual directions, over shares of their energy, towers
and depths. The same command again continues an interrupted analysis. docs/analysis.md says what is measured.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.studies.analysis_config import parse_analysis


def main(argv: Sequence[str]) -> None:
    """The command line."""
    config = parse_analysis(argv, __doc__)

    from mllm_keeplora.recipes.small.streams import build_small_base, draw_small_stream
    from mllm_keeplora.studies.analysis import PICTURE, RESULTS, analyze, format_analysis

    draw_small_stream(config.stream, config.data_root)
    build_small_base(config.model.base_model)
    results = analyze(config)
    out = Path(config.out)
    print(f"{format_analysis(config, results)}\n\nresults: {out / RESULTS}\npicture: {out / PICTURE}")
