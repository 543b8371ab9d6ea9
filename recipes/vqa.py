"""Continual VQA: KeepLoRA++ over a stream of image-question tasks, retention measured after every one.

    bash scripts/run_vqa_stream.sh                                            the embedded default
    accelerate launch recipes/vqa.py --config recipes/configs/vqa/FILE.yaml   any other

The command line wins over the file: --language.rank 8. --help lists every setting with its default.
"""

from pathlib import Path

from mllm_keeplora.commands.run import Embedded, run_recipe

EMBEDDED = Embedded(
    config=Path("recipes/configs/vqa/small.yaml"),
    stream=Path("recipes/streams/small_vqa.yaml"),
    data=Path("data/small_vqa"),
    builder="build_vqa_data",
)

if __name__ == "__main__":
    run_recipe(__doc__, EMBEDDED)
