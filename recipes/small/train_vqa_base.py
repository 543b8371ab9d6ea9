"""Trains the small base model from scratch on drawn scenes and measures what it learnt.

    python -m mllm_keeplora.recipes.small.train_vqa_base --out recipes/small/vqa_base

A real `LlavaForConditionalGeneration` of about 1.5 M parameters: a CLIP tower of 5 layers (features of the
fourth), a Llama language model of 4, 16 image tokens. Training has three phases, all on freshly drawn images:

1. tower: a throw-away linear head names place, colour and shape of the object in every patch;
2. language: conversations of six questions about a scene, loss on the answers only; after a while with a
   seventh question in words that the scenes do not use;
3. rounded: the same, with every weight that will be stored in NF4 rounded to NF4 in the forward pass and the
   gradient passed straight through, so that quantisation costs the finished model next to nothing.

Accuracy is then measured on held-out single questions, greedily decoded, by the saved model loaded back in
fp32 and in NF4, and written to `training.json` and `README.md` beside the weights.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm_keeplora.command_line import command
from mllm_keeplora.recipes.small import base_training as common
from mllm_keeplora.recipes.small import draw


class Batch(NamedTuple):
    """Drawn scenes: pixel_values [b, 3, 64, 64], input_ids and labels [b, n], classes of patches [b, 16]."""

    pixel_values: Tensor
    input_ids: Tensor
    labels: Tensor
    colors: Tensor
    shapes: Tensor


def main() -> None:
    with command():
        out, setup = common.parse_command(__doc__, common.Setup())
        common.train_base(
            out, setup, build_processor(), build_model, _train, _measure, "Small base model", _DESCRIPTION
        )


_DESCRIPTION = "A LLaVA of {parameters} parameters trained from scratch on drawn scenes"


def _train(model: LlavaForConditionalGeneration, processor: LlavaProcessor, setup: common.Setup) -> None:
    batches = Batches(processor, np.random.default_rng(setup.seed))
    train_tower(model, batches, setup)
    train_language(model, batches, setup)


def _measure(folder: Path, setup: common.Setup) -> dict[str, dict[str, float]]:
    rng = np.random.default_rng([setup.seed, 1])
    questions = [_held_out_question(rng, index) for index in range(setup.measured_questions)]
    return {
        name: common.measure(folder, LlavaForConditionalGeneration, "image", questions, quantised=name == "nf4")
        for name in ("fp32", "nf4")
    }


def build_processor() -> LlavaProcessor:
    """The tokenizer (whole words where it knows them, else letters), image processor and chat template."""
    return LlavaProcessor(
        CLIPImageProcessor(**common.PIXELS),
        common.word_tokenizer(("<image>",), spoken_words()),
        chat_template=common.chat_template("image"),
        **common.PROCESSOR,
    )


def spoken_words() -> list[str]:
    """Every word of the domains' questions and answers, then the common words, each once."""
    rng, scans = np.random.default_rng(0), load_digits()
    drawings = [draw.digit(rng, scans.images[index], int(scans.target[index])) for index in range(100)]
    for _ in range(500):  # far more than it takes to meet every word of every template
        drawings += [draw.scene(rng)[0], draw.chart(rng), draw.clock(rng), draw.ground(rng)]
    return common.words_of(question for drawing in drawings for question in drawing.questions)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model."""
    return LlavaForConditionalGeneration(LlavaConfig(**common.model_settings(tokenizer, vision_layers=5)))


class Batches:
    """Draws training batches, tokenised as the processor would tokenise them."""

    def __init__(self, processor: LlavaProcessor, rng: np.random.Generator) -> None:
        self.conversations = common.Conversations(processor.tokenizer, "<image>" * draw.GRID**2)
        self.talk = common.Talk(rng, spoken_words())

    def next(self, size: int) -> Batch:
        scenes = [draw.scene(self.talk.rng) for _ in range(size)]
        ids, labels = self.conversations.batch(
            self.talk.turns(drawing.questions, [item.color for item in objects]) for drawing, objects in scenes
        )
        classes = np.zeros((2, size, draw.GRID**2), dtype=np.int64)  # 0: no object in this patch
        for index, (_, objects) in enumerate(scenes):
            for item in objects:
                cell = item.row * draw.GRID + item.column
                classes[0, index, cell] = 1 + list(draw.COLORS).index(item.color)
                classes[1, index, cell] = 1 + draw.SHAPES.index(item.shape)
        pixels = np.stack([np.asarray(drawing.image) for drawing, _ in scenes])
        return Batch(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1,
            ids,
            labels,
            *torch.from_numpy(classes),
        )


def train_tower(model: LlavaForConditionalGeneration, batches: Batches, setup: common.Setup) -> None:
    """Phase 1: the tower learns to see. The head on its features is thrown away."""
    tower = model.model.vision_tower
    classes = (draw.GRID**2, len(draw.COLORS) + 1, len(draw.SHAPES) + 1)  # no object: class 0
    head = nn.Linear(tower.config.hidden_size, sum(classes))
    steps = common.steps(
        "tower",
        setup.tower_steps,
        setup.tower_lr,
        [*tower.parameters(), *head.parameters()],
        lambda: batches.next(setup.tower_batch),
        setup,
    )
    for batch in steps:
        features = tower(batch.pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        places = torch.arange(draw.GRID**2).expand_as(batch.colors)
        loss = torch.zeros(())
        for logits, truth in zip(head(features).split(classes, -1), (places, batch.colors, batch.shapes), strict=True):
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), truth.flatten())
        loss.backward()


def train_language(model: LlavaForConditionalGeneration, batches: Batches, setup: common.Setup) -> None:
    """Phases 2 and 3, one learning-rate schedule over both."""
    total = setup.plain_steps + setup.language_steps + setup.rounded_steps
    linears = common.quantised_linears(model)
    steps = common.steps(
        "language",
        total,
        setup.lr,
        list(model.parameters()),
        lambda: batches.next(setup.batch),
        setup,
    )
    for step, batch in enumerate(steps):
        batches.talk.loose = step >= setup.plain_steps
        with common.rounded_to_nf4(linears if step >= total - setup.rounded_steps else []):
            loss = model(
                input_ids=batch.input_ids,
                pixel_values=batch.pixel_values,
                labels=batch.labels,
                use_cache=False,
            ).loss
            loss.backward()


def _held_out_question(rng: np.random.Generator, index: int) -> tuple[Image.Image, draw.Question]:
    """A fresh scene and one question about it, the kinds in turn."""
    drawing, _ = draw.scene(rng)
    kinds = sorted({question.kind for question in drawing.questions})
    kind = kinds[index % len(kinds)]
    return drawing.image, next(question for question in drawing.questions if question.kind == kind)


if __name__ == "__main__":
    main()
