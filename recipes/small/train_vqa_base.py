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

import json
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mllm_keeplora.command_line import command
from mllm_keeplora.recipes.small import base_training as common
from mllm_keeplora.recipes.small import draw
from mllm_keeplora.recipes.small.folders import whole_folder


class Setup(NamedTuple):
    """How long and how to train. Steps and images per step of each phase; peak learning rates of AdamW."""

    seed: int = 2026
    tower_steps: int = 600
    tower_batch: int = 64
    tower_lr: float = 2e-3
    plain_steps: int = 1200
    language_steps: int = 2200
    rounded_steps: int = 800
    batch: int = 32
    lr: float = 1.5e-3
    weight_decay: float = 0.02
    warmup: float = 0.05  # fraction of a phase's steps
    measured_questions: int = 1000

    @property
    def optimisation(self) -> common.Optimisation:
        """What every phase shares."""
        return common.Optimisation(self.weight_decay, self.warmup)


class Batch(NamedTuple):
    """Drawn scenes: pixel_values [b, 3, 64, 64], input_ids and labels [b, n], classes of patches [b, 16]."""

    pixel_values: Tensor
    input_ids: Tensor
    labels: Tensor
    colors: Tensor
    shapes: Tensor


def main() -> None:
    with command():
        train_base(*common.parse_command(__doc__, Setup()))


def train_base(out: Path, setup: Setup) -> None:
    """Trains, saves and measures the base model; `out` is replaced only by a finished model."""
    started = time.monotonic()
    torch.manual_seed(setup.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    batches = Batches(processor, np.random.default_rng(setup.seed))
    train_tower(model, batches, setup)
    train_language(model, batches, setup)
    with whole_folder(out, replace=True) as staging:
        model.bfloat16().save_pretrained(staging)
        processor.save_pretrained(staging)
        held_out = np.random.default_rng([setup.seed, 1])
        questions = [_held_out_question(held_out, index) for index in range(setup.measured_questions)]
        accuracy = {
            name: common.measure(staging, LlavaForConditionalGeneration, "image", questions, quantised=name == "nf4")
            for name in ("fp32", "nf4")
        }
        minutes = (time.monotonic() - started) / 60
        description = "A LLaVA of {parameters} parameters trained from scratch on drawn scenes"
        common.write_account(staging, "Small base model", description, setup, accuracy, model, minutes)
    print(f"wrote {out}: {json.dumps(accuracy)}")


def build_processor() -> LlavaProcessor:
    """The tokenizer (whole words where it knows them, else letters), image processor and chat template."""
    side = {"height": draw.SIZE, "width": draw.SIZE}
    image_processor = CLIPImageProcessor(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor,
        common.word_tokenizer(("<image>",), spoken_words()),
        patch_size=draw.CELL,
        vision_feature_select_strategy="default",
        chat_template=common.chat_template("image"),
        image_token="<image>",
        num_additional_image_tokens=1,  # the class token, which the "default" strategy drops again
    )


def spoken_words() -> list[str]:
    """Every word of the domains' questions and answers, then the common words, each once."""
    rng, scans = np.random.default_rng(0), load_digits()
    drawings = [draw.digit(rng, scans.images[index], int(scans.target[index])) for index in range(100)]
    for _ in range(500):  # far more than it takes to meet every word of every template
        drawings += [draw.scene(rng)[0], draw.chart(rng), draw.clock(rng), draw.ground(rng)]
    return common.words_of(question for drawing in drawings for question in drawing.questions)


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """The untrained model. Every in_features is a multiple of 64, the block size of NF4."""
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=draw.SIZE,
        patch_size=draw.CELL,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        **special,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=draw.GRID**2,
        tie_word_embeddings=False,
        **special,
    )
    return LlavaForConditionalGeneration(config)


class Batches:
    """Draws training batches, tokenised as the processor would tokenise them."""

    def __init__(self, processor: LlavaProcessor, rng: np.random.Generator) -> None:
        self.conversations = common.Conversations(processor.tokenizer, "<image>" * draw.GRID**2)
        self.rng = rng
        self.words = [word for word in spoken_words() if word.isalpha() and word not in {*draw.COLORS, *draw.SHAPES}]
        self.loose = False  # whether conversations hold a loose turn

    def next(self, size: int) -> Batch:
        scenes = [draw.scene(self.rng) for _ in range(size)]
        ids, labels = self.conversations.batch(self._turns(drawing.questions, objects) for drawing, objects in scenes)
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

    def _turns(self, questions: list[draw.Question], objects: list[draw.SceneObject]) -> list[tuple[str, str]]:
        """The questions as turns, with or without a loose turn among them."""
        turns = [(question.text, question.answer) for question in questions]
        if self.loose:
            turns.insert(int(self.rng.integers(len(turns) + 1)), self._loose_turn(objects))
        return turns

    def _loose_turn(self, objects: list[draw.SceneObject]) -> tuple[str, str]:
        """A question around words that the scene does not explain.

        Without it the model answers only the exact wordings of the scenes, starts at zero on any other task
        and has no trained place for most words in the output layer, which LoRA does not reach.
        """
        first, second = (str(word) for word in self.rng.choice(self.words, size=2))
        thing = f"{first} {second}" if self.rng.integers(2) else first
        colors = [item.color for item in objects]
        color = str(self.rng.choice(colors if self.rng.integers(2) else list(draw.COLORS)))
        turns = [
            (f"Say {first}.", first),
            (f"What color is the {thing}?", str(self.rng.choice(colors))),
            (f"How many {first} are there?", draw.NUMBERS[len(objects)]),
            (f"Is there a {color} {first}?", "yes" if color in colors else "no"),
            (f"Is there {thing}?", "no"),
        ]
        return turns[int(self.rng.integers(len(turns)))]


def train_tower(model: LlavaForConditionalGeneration, batches: Batches, setup: Setup) -> None:
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
        setup.optimisation,
    )
    for batch in steps:
        features = tower(batch.pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        places = torch.arange(draw.GRID**2).expand_as(batch.colors)
        loss = torch.zeros(())
        for logits, truth in zip(head(features).split(classes, -1), (places, batch.colors, batch.shapes), strict=True):
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), truth.flatten())
        loss.backward()


def train_language(model: LlavaForConditionalGeneration, batches: Batches, setup: Setup) -> None:
    """Phases 2 and 3, one learning-rate schedule over both."""
    total = setup.plain_steps + setup.language_steps + setup.rounded_steps
    linears = common.quantised_linears(model)
    steps = common.steps(
        "language",
        total,
        setup.lr,
        list(model.parameters()),
        lambda: batches.next(setup.batch),
        setup.optimisation,
    )
    for step, batch in enumerate(steps):
        batches.loose = step >= setup.plain_steps
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
