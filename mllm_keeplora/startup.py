"""Lets every program of an environment import PyPI's torchvision beside a CPU-only torch.

`import mllm_keeplora` does that for programs that begin with it. Others' commands do not: `accelerate launch`
and `lmms-eval` import torchvision before any code of ours, and end there. So scripts/_setup.sh has Python
itself run this file at every start (a .pth file in .venv). That costs nothing until torchvision is imported.
"""

import importlib.abc
import sys


def declare_torchvision_operators() -> None:
    """Declares the two operators that torchvision's CUDA-linked library would define; without them its import
    fails. Nothing where torch has CUDA, or where they exist."""
    import torch

    if torch.version.cuda is not None:
        return
    existing = torch._C._dispatch_get_all_op_names()
    for name, arguments in (
        ("nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
        ("qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"),
    ):
        if f"torchvision::{name}" not in existing:
            torch.library.define(f"torchvision::{name}", arguments)


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it declares the operators when torchvision is first looked for."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            declare_torchvision_operators()


def install() -> None:
    """Puts the finder before all others."""
    sys.meta_path.insert(0, BeforeTorchvision())
