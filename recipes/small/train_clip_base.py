"""Trains the small CLIP from scratch on drawn pictures with captions and measures what it learnt.

    python -m mllm_keeplora.recipes.small.train_clip_base --out recipes/small/clip_base

A real `CLIPModel`: two towers of 4 layers, 128 wide. Each step shows pictures of one coloured shape with captions, and
a few charts, clocks and grounds, so that it knows a little of what the tasks ask; handwritten digits it never sees.
The loss is the cross-entropy of each picture among the captions of its step, each caption once. At the end every weight
that will be stored in NF4 is rounded to NF4 in the forward pass, so that quantisation costs next to nothing.

Accuracy is then measured on fresh pictures, the shape's class among all, by the saved model in fp32 and in NF4.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from mllm_keeplora.command_line import command
from mllm_keeplora.config import ModelConfig
from mllm_keeplora.data.classification import process_pictures, tokenise
from mllm_keeplora.modeling.families import FAMILIES
from mllm_keeplora.modeling.loading import load_base
from mllm_keeplora.recipes.small import base_training as common
from mllm_keeplora.recipes.small import draw, draw_classes
from mllm_keeplora.recipes.small.draw_classes import DOMAINS, DRAWN, SCENE_TEMPLATE, SCENES

LONGEST = 32  # tokens of a prompt
PLACES = tuple(f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right"))
# Ways to say what a scene shows; a step takes one, since those of one picture are all true.
CAPTIONS = (SCENE_TEMPLATE, "a {}.", "a drawing of the {}.", "there is a {} in the picture.", "{}")


@dataclass(frozen=True)
class Setup(common.Setup):
    """`plain_steps`, then `rounded_steps`, of `batch` scenes and one picture of each other domain."""

    plain_steps: int = 1800
    rounded_steps: int = 400
    batch: int = 64
    lr: float = 1e-3


class Batch(NamedTuple):
    """pixel_values [b, 3, 64, 64]; input_ids and attention_mask [captions, tokens]; the caption [b] of each."""

    pixel_values: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    captions: Tensor


def main() -> None:
    with command():
        out, setup = common.parse_command(__doc__, Setup())
        account = ("Small base model", _DESCRIPTION, (), "pictures of one shape, the class among 30")
        common.train_base(out, setup, build_processor(), build_model, _train, _measure, *account)


_DESCRIPTION = "A CLIP of {parameters} parameters trained from scratch on drawn pictures with captions"


def build_processor() -> CLIPProcessor:
    """The tokenizer (whole words where it knows them, else letters) and image processor."""
    tokenizer = common.word_tokenizer((), spoken_words())
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.padding_side, tokenizer.model_max_length = "right", LONGEST
    return CLIPProcessor(CLIPImageProcessor(**common.PIXELS), tokenizer)


def spoken_words() -> list[str]:
    """Every word of captions and prompts, then common words, each once."""
    names = [*SCENES, *PLACES, *(name for domain in DOMAINS.values() for name in domain.names)]
    texts = [*names, *CAPTIONS, *(domain.template for domain in DOMAINS.values())]
    words = " ".join(texts).replace("{}", " ").replace(".", " ").split()
    return list(dict.fromkeys([*sorted(set(words)), *common.COMMON_WORDS.split()]))


def build_model(tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """The untrained model. Every in_features is a multiple of 64, NF4's block size."""
    size = {"hidden_size": common.WIDTH, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 4}
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LONGEST, **size, **special}
    vision = {"image_size": draw.SIZE, "patch_size": draw.CELL, **size}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=common.WIDTH))


class Batches:
    """Draws training batches, processed as the processor would."""

    def __init__(self, processor: CLIPProcessor, rng: np.random.Generator) -> None:
        self.processor, self.rng = processor, rng

    def next(self, size: int) -> Batch:
        way = CAPTIONS[int(self.rng.integers(len(CAPTIONS)))]
        scenes = (draw_classes.scene(self.rng) for _ in range(size))
        shown = [(image, way.replace("{}", name)) for image, name in scenes]
        for domain, function in DRAWN.items():
            image, name = draw_classes.classed(domain, function(self.rng))
            shown.append((image, DOMAINS[domain].template.replace("{}", name)))
        captions = list(dict.fromkeys(caption for _, caption in shown))
        tokens = tokenise(self.processor, captions)
        pixels = np.stack([np.asarray(image) for image, _ in shown])
        return Batch(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1,
            tokens["input_ids"],
            tokens["attention_mask"],
            torch.tensor([captions.index(caption) for _, caption in shown]),
        )


def _train(model: CLIPModel, processor: CLIPProcessor, setup: Setup) -> None:
    batches = Batches(processor, np.random.default_rng(setup.seed))
    total = setup.plain_steps + setup.rounded_steps
    linears = common.quantised_linears(model, FAMILIES["clip"].not_quantised)
    steps = common.steps("clip", total, setup.lr, list(model.parameters()), lambda: batches.next(setup.batch), setup)
    for step, batch in enumerate(steps):
        with common.rounded_to_nf4(linears if step >= setup.plain_steps else []):
            found = model(batch.input_ids, batch.pixel_values, batch.attention_mask)
            nn.functional.cross_entropy(found.logits_per_image, batch.captions).backward()


@torch.inference_mode()
def _measure(folder: Path, setup: Setup) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng([setup.seed, 1])
    scenes = [draw_classes.scene(rng, SCENES[index % len(SCENES)]) for index in range(setup.measured_questions)]
    shown = {"scenes": (scenes, SCENES, SCENE_TEMPLATE)}
    for name, function in DRAWN.items():
        drawn = [draw_classes.classed(name, function(rng)) for _ in range(300)]
        shown[name] = (drawn, DOMAINS[name].names, DOMAINS[name].template)
    digits = load_digits()
    scans = [draw.digit(rng, digits.images[i], int(digits.target[i])) for i in range(300)]
    shown["digits"] = ([draw_classes.classed("digits", scan) for scan in scans], *DOMAINS["digits"][:2])
    found: dict[str, dict[str, float]] = {}
    for quantization in ("none", "nf4"):
        config = ModelConfig(base_model=str(folder), quantization=quantization, compute_dtype="float32", device="cpu")
        model, processor = load_base(config)
        row = {name: _accuracy(model, processor, *each) for name, each in shown.items()}
        found["fp32" if quantization == "none" else quantization] = row
    return found


def _accuracy(
    model: Any,
    processor: CLIPProcessor,
    shown: list[tuple[Image.Image, str]],
    names: tuple[str, ...],
    template: str,
) -> float:
    classes = model.prompt_features(**tokenise(processor, [template.replace("{}", name) for name in names]))
    pictures = model.picture_features(process_pictures(processor, [image for image, _ in shown]))
    nearest = (pictures @ classes.T).argmax(1).tolist()
    return float(np.mean([names[index] == name for index, (_, name) in zip(nearest, shown, strict=True)]))


if __name__ == "__main__":
    main()
