"""Continual video understanding: KeepLoRA++ over a stream of video tasks, retention measured after every one.

    accelerate launch recipes/video.py                                            the small default
    accelerate launch recipes/video.py --config recipes/configs/video/FILE.yaml   any other

The same as `keeplora run --config recipes/configs/video/FILE.yaml`, in the form that a launcher of several
processes takes.
"""

import sys
from pathlib import Path

from mllm_keeplora.command_line import command
from mllm_keeplora.commands.run import main

if __name__ == "__main__":
    with command():
        main(sys.argv[1:], Path("recipes/configs/video/small.yaml"))
