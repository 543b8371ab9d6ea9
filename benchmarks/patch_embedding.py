"""Qwen's patch embedding as transformers has it, a Conv3d over single patches, beside one product (docs/log.md).

python benchmarks/patch_embedding.py        1564 patches (a VGA picture), 1280 wide, fp32, one thread: seconds
"""

import copy

import torch
from torch import nn
from torch.utils.benchmark import Timer

from mllm_keeplora.modeling.patch_embedding import embed_patches_by_one_product

PATCHES, WIDTH, PATCH = 1564, 1280, (2, 14, 14)

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    conv = nn.Conv3d(3, WIDTH, PATCH, stride=PATCH, bias=False).requires_grad_(False)
    product = copy.deepcopy(conv)
    embed_patches_by_one_product(product)
    x = torch.randn(PATCHES, 3, *PATCH)
    ways = {"Conv3d": lambda: conv(x), "one product": lambda: product(x)}
    first, second = (way() for way in ways.values())
    for name, way in ways.items():
        print(f"{name:12s}{Timer('way()', globals={'way': way}).timeit(9).median * 1e3:8.0f} ms")
    print(f"largest difference, of the largest output: {float((first - second).abs().max() / first.abs().max()):.1e}")
