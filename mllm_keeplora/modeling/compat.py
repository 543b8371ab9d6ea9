"""Lets PyPI's torchvision import beside a CPU-only torch; nothing heavy is imported until torchvision is.

torchvision registers fake kernels for two operators that its CUDA-linked library defines. Beside a CPU-only
torch that library does not load, the import fails, and transformers' processors, peft and lmms-eval fail with
it. Declaring the two schemas first is enough for everything that does not call them (box suppression, which
no MLLM uses).

`import mllm_keeplora` installs the guard. `accelerate launch` and `lmms-eval` import torchvision before any
code of ours, so there Python itself has to import the package first: `install_at_every_start`, which
scripts/_setup.sh calls for .venv, leaves a .pth file that Python reads whenever it starts. The file could go
if PyPI had a torchvision built for a CPU-only torch; for the versions of constraints.txt it has none.
The guard does nothing where torch has CUDA.
"""

import importlib.abc
import logging
import sys
import warnings

_OPERATORS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def declare_torchvision_operators() -> None:
    """Declares the operators that torchvision's CUDA-linked library would define, where they are missing."""
    import torch

    if torch.version.cuda is not None:
        return
    existing = torch._C._dispatch_get_all_op_names()
    for name, arguments in _OPERATORS.items():
        if f"torchvision::{name}" not in existing:
            torch.library.define(f"torchvision::{name}", arguments)


class BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it declares the operators when torchvision is first looked for."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """See `importlib.abc.MetaPathFinder`."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            # torchvision warns that its image extension did not load; nothing here decodes through it.
            warnings.filterwarnings("ignore", message="Failed to load image Python extension")
            declare_torchvision_operators()


def install() -> None:
    """Puts the finder before all others and drops a message of bitsandbytes that reads like a failure."""
    if "torchvision" not in sys.modules:
        sys.meta_path.insert(0, BeforeTorchvision())
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_missing_kernel)


def _is_no_missing_kernel(record: logging.LogRecord) -> bool:
    """An optional CPU kernel that is absent is no failure."""
    return "gemm_4bit_forward" not in record.getMessage()


def install_at_every_start() -> None:
    """Has Python import the package, and with it this guard, at every start in this environment."""
    import sysconfig
    from pathlib import Path

    Path(sysconfig.get_path("purelib"), "keeplora_startup.pth").write_text("import mllm_keeplora\n")
