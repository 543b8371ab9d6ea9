"""fp32 products in fp32: TF32 rounds their factors to 10 bits; A then answers protected inputs a thousand times more.

Containers switch TF32 on by `TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1`, and libraries do when they are imported (lmms-eval's
wrappers of models). So it is switched off again wherever protection is decided, and a product says whether it is.
"""

import torch
from torch import Tensor

from mllm_keeplora.errors import KeepLoRAError

# Of a product of 64 terms: fp32 stays below 1e-6, TF32's rounding of this factor gives 9.8e-4, bf16's 7.8e-3.
_FACTOR, _TERMS, PRODUCT_TOLERANCE = 1.0 + 2.0**-11, 64, 1e-5


class PrecisionError(KeepLoRAError, RuntimeError):
    """fp32 products that are not made in fp32."""


def exact_products(device: torch.device) -> None:
    """Switches TF32 off in this process, and makes sure of it by a product on the device.

    Raises:
        PrecisionError: the device rounds the factors of fp32 products all the same.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    with torch.autocast(device.type, enabled=False):
        found = float(_product(torch.full((_TERMS, _TERMS), _FACTOR, device=device))[0, 0])
    error = abs(found / (_TERMS * _FACTOR**2) - 1.0)
    if error > PRODUCT_TOLERANCE:
        raise PrecisionError(
            f"fp32 products on {device} are off by {error:.1e}, at most {PRODUCT_TOLERANCE:.0e} is expected: something "
            "rounds their factors (TF32 or bf16), so that what is protected would not be. Take NVIDIA_TF32_OVERRIDE "
            "and TORCH_ALLOW_TF32_CUBLAS_OVERRIDE out of the environment, and update the driver"
        )


def _product(matrix: Tensor) -> Tensor:
    return matrix @ matrix
