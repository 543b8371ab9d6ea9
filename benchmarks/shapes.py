"""Random LLaVA-1.5 and Video-LLaVA models of chosen sizes, without a download; inputs and adapters for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mllm_keeplora  # noqa: F401  # its guards come before the libraries they guard

# isort: split
import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from torch import Tensor, nn
from transformers.quantizers.auto import AutoHfQuantizer

from mllm_keeplora.config import ModelConfig
from mllm_keeplora.modeling.adapters import Factors
from mllm_keeplora.modeling.families import family_of
from mllm_keeplora.modeling.linear4bit import guard_linear4bit
from mllm_keeplora.modeling.loading import DTYPES, quantization_config
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.modeling.targets import Target, find_targets
from mllm_keeplora.planning.skeleton import skeleton_of
from mllm_keeplora.probes.gradients import module_generator

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "<video>", "USER:", "ASSISTANT:"]
PATCH = 14  # pixels a side


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA-1.5, or of a Video-LLaVA, which has two such vision towers.

    Attributes:
        hidden, intermediate, layers, heads: of the language tower.
        vision_hidden, vision_intermediate, vision_layers, vision_heads: of the vision tower. Its last layer
            takes no part in the result.
        image_size: pixels a side, a multiple of 14.
        vocabulary: words.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vision_hidden: int
    vision_intermediate: int
    vision_layers: int
    vision_heads: int
    image_size: int
    vocabulary: int

    @property
    def image_tokens(self) -> int:
        """Tokens that an image becomes."""
        return (self.image_size // PATCH) ** 2


TRUE = Shape(4096, 11008, 32, 32, 1024, 4096, 24, 16, 336, 32064)  # LLaVA-1.5-7B
MIDDLE = Shape(1024, 2816, 4, 8, 512, 2048, 4, 8, 112, 2048)  # what a CPU takes in seconds
TINY = Shape(128, 320, 2, 4, 64, 128, 3, 4, 56, 256)  # for --quick


def llava_config(shape: Shape) -> transformers.LlavaConfig:
    """The model's config."""
    return transformers.LlavaConfig(
        vision_config=_vision_config(shape),
        text_config=_text_config(shape),
        image_token_index=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def video_llava_config(shape: Shape) -> transformers.VideoLlavaConfig:
    """The same for clips: a frame becomes its image tokens and a class token."""
    return transformers.VideoLlavaConfig(
        vision_config=_vision_config(shape),
        text_config=_text_config(shape),
        image_token_index=SPECIAL.index("<image>"),
        video_token_index=SPECIAL.index("<video>"),
    )


def _vision_config(shape: Shape) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_intermediate,
        projection_dim=768,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image_size,
        patch_size=PATCH,
    )


def _text_config(shape: Shape) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def settings_for(device: torch.device, quantization: str = "nf4") -> ModelConfig:
    """bf16 compute on a GPU, fp32 on a CPU, as the recipes have it."""
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    return ModelConfig(base_model="random", compute_dtype=dtype, quantization=quantization)  # type: ignore[arg-type]


def random_model(config: Any, settings: ModelConfig, device: torch.device) -> transformers.PreTrainedModel:
    """The model as `load_base` leaves it, with random weights: norms are ones, biases zeros.

    One dense layer exists at a time.
    """
    model = skeleton_of(config, settings)
    wanted = quantization_config(settings, family_of(config).not_quantised)
    quantizer = AutoHfQuantizer.from_config(wanted) if wanted is not None else None
    if quantizer is not None:
        quantizer.preprocess_model(model, device_map={"": device})
        model.hf_quantizer = quantizer
    generator = torch.Generator(device).manual_seed(0)
    dtype = DTYPES[settings.compute_dtype]
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, Linear4bit) and name == "weight":
                dense = _random((module.out_features, module.in_features), dtype, generator)
                packed = Params4bit(dense.cpu(), requires_grad=False, quant_type="nf4", module=module)
                module.weight = packed.to(device)  # type: ignore[misc]
            elif parameter.ndim < 2:
                ones = name == "weight" and type(module).__name__.endswith("Norm")
                dense = torch.full(parameter.shape, float(ones), dtype=dtype, device=device)
                setattr(module, name, nn.Parameter(dense, requires_grad=False))
            else:
                dense = _random(tuple(parameter.shape), dtype, generator)
                setattr(module, name, nn.Parameter(dense, requires_grad=False))
    nn.Module.to(model, device)  # the buffers
    if quantizer is not None:
        quantizer.postprocess_model(model)
    guard_linear4bit(model)
    model.requires_grad_(False)
    return model.eval()


def all_linear(model: transformers.PreTrainedModel) -> list[Target]:
    """Every linear layer of both towers that takes part in the result."""
    return find_targets(model, {"vision": ["all-linear"], "language": ["all-linear"]})


def random_factors(targets: Sequence[Target], rank: int, seed: str, device: torch.device) -> Factors:
    """An adapter: rows of A have length 1 on average, B is small."""
    factors = {}
    for t in targets:
        generator = module_generator(0, f"{seed}/{t.name}")
        a = torch.randn(rank, t.in_features, generator=generator) * t.in_features**-0.5
        b = torch.randn(t.out_features, rank, generator=generator) * 1e-3
        factors[t.name] = (a.to(device), b.to(device))
    return factors


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A matrix that keeps a vector's length on average."""
    dense = torch.empty(shape, dtype=dtype, device=generator.device)
    return dense.normal_(std=dense[0].numel() ** -0.5, generator=generator)


def random_batch(shape: Shape, size: int, length: int, device: torch.device, seed: int = 0) -> dict[str, Tensor]:
    """`size` samples of `length` tokens: an image, words, and at the end 16 supervised ones."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(len(SPECIAL), shape.vocabulary, (size, length - shape.image_tokens), generator=generator)
    image = torch.full((size, shape.image_tokens), SPECIAL.index("<image>"))
    input_ids = torch.cat([image, words], dim=1)
    labels = input_ids.clone()
    labels[:, :-16] = IGNORED_LABEL
    pixels = torch.randn(size, 3, shape.image_size, shape.image_size, generator=generator)
    dtype = DTYPES[settings_for(device).compute_dtype]
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
    return {name: t.to(device) for name, t in {**batch, "pixel_values": pixels.to(dtype)}.items()}
