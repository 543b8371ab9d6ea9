"""Continual image classification: KeepLoRA++ over a stream of sets with classes, retention measured after every one.

    accelerate launch recipes/classification.py                                                    the small default
    accelerate launch recipes/classification.py --config recipes/configs/classification/FILE.yaml   any other

The same as `keeplora run`, in the form that a launcher of several processes takes.
"""

import sys
from pathlib import Path

from mllm_keeplora.command_line import command
from mllm_keeplora.commands.run import main

if __name__ == "__main__":
    with command():
        main(sys.argv[1:], Path("recipes/configs/classification/small.yaml"))
