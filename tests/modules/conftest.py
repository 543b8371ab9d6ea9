"""A tiny random LLaVA with its processor, loaded by the project's own code, quantised or not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm_keeplora.config import ModelConfig
from mllm_keeplora.modeling.adapters import Factors
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.modeling.targets import Target, find_targets
from tests.clips import write_clip
from tests.modules.tiny_families import save_tiny

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "USER:",
    "ASSISTANT:",
    "what",
    "is",
    "this",
    "?",
    "yes",
    "no",
    "red",
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% else %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
BOTH_TOWERS = {"vision": ["all-linear"], "language": ["all-linear"]}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a random LLaVA: 3 vision layers of 64 (features after the 2nd), 2 language ones of 128."""
    directory = tmp_path_factory.mktemp("tiny_llava")
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )
    size = {"height": 64, "width": 64}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=64,
            patch_size=16,
        ),
        text_config=LlamaConfig(
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=len(WORDS),
        ),
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-2,
    )
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # the default init is so small that gradients drown in rounding
        if parameter.ndim == 2:
            torch.nn.init.xavier_normal_(parameter)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a family's tiny model, made on first use. Nobody changes it."""
    root = tmp_path_factory.mktemp("families")

    def directory(family: str) -> Path:
        if not (root / family).exists():
            save_tiny(family, root / family)
        return root / family

    return directory


@pytest.fixture(scope="session")
def media_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of `write_media`."""
    root = tmp_path_factory.mktemp("media")
    write_media(root)
    return root


def write_media(root: Path) -> None:
    """Four images and four clips of noise, of two sizes."""
    rng = np.random.default_rng(0)
    for number in range(4):
        shape = (64, 64, 3) if number % 2 else (48, 80, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(root / f"{number}.png")
        write_clip(root / f"{number}.mp4", list(rng.integers(0, 255, (12, *shape), dtype=np.uint8)))


@pytest.fixture(params=["none", "nf4"])
def quantization(request: pytest.FixtureRequest) -> str:
    """Both kinds of base."""
    return request.param


@pytest.fixture
def model(tiny_llava: Path, quantization: str) -> Any:
    """The tiny model as a run loads it."""
    return load_base(model_config(tiny_llava, quantization))[0]


@pytest.fixture
def nf4_model(tiny_llava: Path) -> Any:
    """The tiny model on an NF4 base."""
    return load_base(model_config(tiny_llava, "nf4"))[0]


def model_config(directory: Path, quantization: str) -> ModelConfig:
    """Settings that load the tiny model."""
    return ModelConfig(base_model=str(directory), quantization=quantization, device="cpu")  # type: ignore[arg-type]


def all_targets(model: Any) -> list[Target]:
    """Every adaptable linear layer of both towers."""
    return find_targets(model, BOTH_TOWERS)


def batch(size: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Images with a question of 3 tokens and an answer of 4 supervised ones."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(5, len(WORDS), (size, 7), generator=generator)
    image = torch.full((size, 16), WORDS.index("<image>"))
    input_ids = torch.cat([image, words], dim=1)
    labels = input_ids.clone()
    labels[:, :19] = -100
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": labels,
        "pixel_values": torch.randn(size, 3, 64, 64, generator=generator),
    }


def read_adapter(directory: Path) -> Factors:
    """The factors in a directory that PEFT loads adapters from."""
    tensors = load_file(directory / "adapter_model.safetensors")
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = [key[len(prefix) : -len(suffix)] for key in tensors if key.endswith(suffix)]
    return {n: (tensors[f"{prefix}{n}.lora_A.weight"], tensors[f"{prefix}{n}.lora_B.weight"]) for n in names}
