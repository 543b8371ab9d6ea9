"""Continual video understanding: KeepLoRA++ over a stream of video tasks, retention measured after every one.

    bash scripts/run_video_stream.sh                                              the embedded default
    accelerate launch recipes/video.py --config recipes/configs/video/FILE.yaml   any other

The command line wins over the file: --video.frames 16. --help lists every setting with its default.
"""

from pathlib import Path

from mllm_keeplora.recipe import Embedded, run_recipe

EMBEDDED = Embedded(
    config=Path("recipes/configs/video/embedded.yaml"),
    stream=Path("recipes/streams/embedded_video.yaml"),
    data=Path("data/embedded_video"),
    builder=Path("recipes/embedded/build_video_data.py"),
)

if __name__ == "__main__":
    run_recipe(__doc__, EMBEDDED)
