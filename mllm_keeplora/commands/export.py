"""Merges a run's adapter into its base: one stand-alone model of 16 bit.

    keeplora export runs/vqa_small --out exported/

For serving engines that cannot apply LoRA to a vision tower (docs/serving.md). Merging into the 4-bit weights
themselves would lose most of a small update, hence the dequantised base. What rounding to 16 bit costs is measured on
the test questions of the run's last task, and printed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import Dtype


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = OptionParser("keeplora export", __doc__)
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    text = "of its weights; float32 rounds nothing (default: %(default)s)"
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16", help=text)
    given = parser.read(argv)

    from mllm_keeplora.continual.export import export
    from mllm_keeplora.continual.saved_run import load_run

    difference = export(given.run, given.out, given.dtype)
    asked, same = "questions", "of the answer positions have the same top token"
    if load_run(given.run).chooses:
        asked, same = "pictures", "of them have the same nearest class"
    print(
        f"{given.out}: {given.dtype}. Compared with the 4-bit base and its adapter on {difference.questions} "
        f"test {asked}, logits differ by {difference.relative_logits:.2e} of their norm, and "
        f"{100 * difference.same_top_token:.1f} % {same}"
    )
