"""Continual VQA: KeepLoRA++ over a stream of image-question tasks, retention measured after every one.

    bash scripts/run_vqa_stream.sh                                            the embedded default
    accelerate launch recipes/vqa.py --config recipes/configs/vqa/FILE.yaml   any other

The command line wins over the file: --language.rank 8. --help lists every setting with its default.
"""

import os
import subprocess
import sys
from pathlib import Path

from mllm_keeplora.config import parse_config
from mllm_keeplora.console import command
from mllm_keeplora.stream_runner import run_stream

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_CONFIG = Path("recipes/configs/vqa/embedded.yaml")
EMBEDDED_STREAM = Path("recipes/streams/embedded.yaml")
EMBEDDED_DATA = Path("data/embedded")


def build_embedded_data() -> None:
    """Draws the embedded stream's images on first use."""
    if not EMBEDDED_DATA.exists():
        script = "recipes/embedded/build_data.py"
        subprocess.run([sys.executable, script, "--out", str(EMBEDDED_DATA)], check=True)


def main() -> None:
    """Parses the settings, then builds and runs the stream."""
    os.chdir(ROOT)  # every relative path in the shipped files is relative to the repository
    with command():
        config = parse_config(__doc__ or "", DEFAULT_CONFIG)
        if Path(config.stream) == EMBEDDED_STREAM and config.data_root is None:
            build_embedded_data()
        run_stream(config)


if __name__ == "__main__":
    main()
