"""Puts a run's adapter with its model card on the Hugging Face hub.

    keeplora push runs/vqa_small USER/NAME --dry_run      only the files and their sizes
    keeplora push runs/vqa_small USER/NAME                one commit; the repository is made if missing
    keeplora push runs/vqa_small USER/NAME --stage 2      the adapter as it was after the second stage

Log in first by `hf auth login`, or set HF_TOKEN. The folder that goes there is the adapter's: factors, processor, chat
template and card. The card quotes one test question of the task that was learnt last.
"""

from collections.abc import Sequence
from pathlib import Path

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.units import format_bytes


def main(argv: Sequence[str]) -> None:
    """The command line."""
    parser = OptionParser("keeplora push", __doc__)
    parser.add_argument("run", type=Path, help="directory of a run, or of what keeplora edit has made")
    parser.add_argument("repo", help="USER/NAME on the hub")
    parser.add_argument("--stage", metavar="STAGE", help="as it was after this stage, by number or task")
    parser.add_argument("--private", action="store_true", help="make a private repository, where there is none")
    parser.add_argument("--dry_run", action="store_true", help="send nothing")
    given = parser.read(argv)

    from mllm_keeplora.continual.saved_run import load_run
    from mllm_keeplora.reports.publishing import push

    options = {name: getattr(given, name) for name in ("stage", "private", "dry_run")}
    pushed = push(load_run(given.run), given.repo, **options)
    width = max(map(len, pushed.files))
    for name, size in pushed.files.items():
        print(f"{name:{width}}  {format_bytes(size)}")
    print(f"{len(pushed.files)} files, {format_bytes(sum(pushed.files.values()))}")
    if pushed.warning:
        print(f"note: {pushed.warning}")
    print(pushed.url or f"nothing was sent to {given.repo} (--dry_run)")
