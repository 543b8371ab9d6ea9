"""Guards for third-party behaviour that would otherwise break or silently corrupt a run.

Both are no-ops where the platform behaves: a CUDA build of torch beside torchvision, a GPU, a CPU without
AVX512-BF16.
"""

import importlib.util
import logging
import warnings

import torch

from mllm_keeplora.startup import declare_torchvision_operators


def allow_torchvision_without_cuda() -> None:
    """Lets PyPI's CUDA-linked torchvision import beside a CPU-only torch.

    torchvision registers fake kernels for two operators that its CUDA-linked C++ library defines; beside a
    CPU-only torch that library does not load and the import fails, and with it transformers' processors, peft
    and lmms-eval. Declaring the two schemas first is enough for everything that does not call them (box
    suppression, which no MLLM uses).

    Must run before transformers, peft or lmms-eval are imported.
    """
    if importlib.util.find_spec("torchvision") is None or torch.version.cuda is not None:
        return
    declare_torchvision_operators()
    with warnings.catch_warnings():
        # torchvision warns that its image extension did not load; nothing here decodes through it.
        warnings.simplefilter("ignore")
        import torchvision  # noqa: F401


def silence_missing_cpu_kernels() -> None:
    """Drops bitsandbytes' message that an optional CPU kernel is absent: it reads like a failure."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
        lambda record: "gemm_4bit_forward" not in record.getMessage()
    )


def guard_linear4bit(model: torch.nn.Module) -> int:
    """Keeps bitsandbytes from repacking 4-bit weights in place on CPUs with AVX512-BF16.

    Without it the first inference-mode forward rewrites the packed weight; every later gradient through that
    layer is missing or wrong and `dequantize_4bit` returns garbage. Call right after loading, before any
    forward.

    Args:
        model: a loaded model; modified in place.

    Returns:
        The number of `Linear4bit` modules guarded (0 for a model that is not quantised).
    """
    from bitsandbytes.nn.modules import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)
