"""Patch embeddings as one product, on transformers' own modules."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionPatchEmbed
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed

from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.patch_embedding import SinglePatchConv3d, embed_patches_by_one_product
from tests.modules.conftest import model_config

EMBEDDINGS = {
    "Qwen2.5-VL": lambda: Qwen2_5_VisionPatchEmbed(14, 2, 3, 1280),
    "Qwen3-VL": lambda: Qwen3VLVisionPatchEmbed(Qwen3VLVisionConfig(hidden_size=1152)),  # with a bias
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_embedding_is_the_same_function(name: str, dtype: torch.dtype) -> None:
    """As transformers' own in fp32, by values and gradients; its Conv3d sums weight gradients in bf16."""
    torch.manual_seed(0)
    stock = EMBEDDINGS[name]().to(dtype)
    patches = torch.randn(64, 3 * 2 * stock.patch_size**2, dtype=dtype)
    upstream = torch.randn(64, stock.embed_dim, dtype=dtype)

    def outcome(embedding: nn.Module) -> list[torch.Tensor]:
        read = patches.to(embedding.proj.weight.dtype, copy=True).requires_grad_()
        found = embedding(read)
        return [found.detach(), *torch.autograd.grad(found, [read, embedding.proj.weight], upstream.to(found.dtype))]

    found = copy.deepcopy(stock)
    embed_patches_by_one_product(found)
    assert type(found.proj) is SinglePatchConv3d
    assert all(torch.equal(value, stock.state_dict()[key]) for key, value in found.state_dict().items())
    bound = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps  # of 1176 summands in fp32; of the result
    for one, other in zip(outcome(found), outcome(stock.float()), strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        assert float((one.float() - other).abs().max()) <= bound * float(other.abs().max())


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4)),
        nn.Conv3d(3, 8, 3, padding=1),
        nn.Conv3d(4, 8, 2, groups=2),
        nn.Conv3d(3, 8, 2, dilation=2),
    ],
    ids=["slides", "pads", "groups", "dilates"],
)
def test_what_slides_stays_a_convolution(conv: nn.Conv3d) -> None:
    pixels = torch.randn(2, conv.in_channels, 4, 8, 8)
    expected = conv(pixels)
    embed_patches_by_one_product(conv)
    assert torch.equal(conv(pixels), expected)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_a_base_is_loaded_so(family: str, tiny: Any) -> None:
    model, _ = load_base(model_config(tiny(family), "none"))
    assert any(type(module) is SinglePatchConv3d for module in model.modules())
