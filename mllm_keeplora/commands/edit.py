"""Makes an adapter of some of a run's stages: an earlier state, a sum without a task, a smaller copy.

    keeplora edit runs/vqa_small --stage 2 --out runs/after_charts             as it was after its second stage
    keeplora edit runs/vqa_small --drop charts --out runs/without_charts       the sum of the other stages' updates
    keeplora edit runs/vqa_small --scale digits=1.5 clocks=0.5 --out runs/mix  with factors of one's own
    keeplora edit runs/vqa_small --rank 32 --dtype bfloat16 --out runs/compact a smaller copy; its error is printed

A stage is named by its number or its task. What comes out is a folder that `chat`, `evaluate`, `export` and `push`
take like a run; its adapter has one rank throughout, as serving engines want it. The base model is not loaded.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.config import Count, Dtype
from mllm_keeplora.errors import ConfigError
from mllm_keeplora.units import format_bytes

_SHOWN = 3  # modules with the largest errors


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = OptionParser("keeplora edit", __doc__)
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("--out", type=Path, required=True, help="directory to create")
    parser.add_argument("--stage", metavar="STAGE", help="leave out what was learnt after this stage")
    parser.add_argument("--only", metavar="STAGE", nargs="+", default=[], help="the stages to take (default: all)")
    parser.add_argument("--drop", metavar="STAGE", nargs="+", default=[], help="stages to leave out")
    text = "what a stage's update is multiplied by, in place of 1"
    parser.add_argument("--scale", metavar="STAGE=c", nargs="+", default=[], help=text)
    parser.add_setting("rank", Count, "most directions a module keeps (default: all)", default=None)
    text = "of the factors (default: %(default)s, which rounds nothing)"
    parser.add_argument("--dtype", choices=get_args(Dtype), default="float32", help=text)
    given = parser.read(argv)
    scale: dict[int | str, float] = dict(map(_factor, given.scale))

    from mllm_keeplora.continual.edits import edit, edit_label
    from mllm_keeplora.continual.saved_run import load_run
    from mllm_keeplora.reports.card import write_card

    run = load_run(given.run)
    names = ("stage", "only", "drop", "rank", "dtype")
    made = edit(run, given.out, scale=scale, **{name: getattr(given, name) for name in names})
    write_card(made)
    facts = made.edit or {}
    size = format_bytes(made.directory.adapter_weights.stat().st_size)
    print(f"{made.directory.adapter}: {edit_label(facts)}; {size}")
    if facts["error"]["total"]:
        print(f"error of the update, ||dW' - dW|| / ||dW||: {facts['error']['total']:.2e} over all modules")
        worst = sorted(facts["error"]["modules"].items(), key=lambda pair: -pair[1])[:_SHOWN]
        print("\n".join(f"  {error:.2e}  {name}" for name, error in worst))


def _factor(text: str) -> tuple[int | str, float]:
    name, equals, number = text.rpartition("=")
    try:
        return name, float(number)
    except ValueError as error:
        raise ConfigError(f"--scale {text}: expected STAGE=c, such as charts=0.5") from error
