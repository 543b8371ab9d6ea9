"""Continual video understanding: KeepLoRA++ over a stream of video tasks, retention measured after every one.

    bash scripts/run_video_stream.sh                                              the embedded default
    accelerate launch recipes/video.py --config recipes/configs/video/FILE.yaml   any other

The command line wins over the file: --video.frames 16. --help lists every setting with its default.
"""

from pathlib import Path

from mllm_keeplora.commands.run import Embedded, run_recipe

EMBEDDED = Embedded(
    config=Path("recipes/configs/video/small.yaml"),
    stream=Path("recipes/streams/small_video.yaml"),
    data=Path("data/small_video"),
    builder="build_video_data",
)

if __name__ == "__main__":
    run_recipe(__doc__, EMBEDDED)
