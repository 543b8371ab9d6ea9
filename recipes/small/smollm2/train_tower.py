"""Trains the vision tower and the projector of the real small model; its language model stays as it is.

    python -m mllm_keeplora.recipes.small.smollm2.train_tower --out recipes/small/smollm2

Pictures are freshly drawn scenes and easy-VQA's training pictures. The tower starts from that of
`recipes/small/vqa_base`. Three phases, each cheaper per picture than the next:

1. see: throw-away heads name colour and shape in every patch, and how many objects there are;
2. name: the projector learns to give a patch the language model's own embeddings of the words for what is there:
   colour, shape, half and half; an empty patch says how many objects there are;
3. answer: conversations of six questions, through the language model as NF4 stores it, loss on the answers alone.

Writes `vision.safetensors` and `training.json`: settings, time, and the accuracy on held-out questions of the model
that `build_base.py` then builds.
"""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from mllm_keeplora.command_line import command
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.recipes.small import base_training as common
from mllm_keeplora.recipes.small import draw
from mllm_keeplora.recipes.small.draw import NUMBERS, Question
from mllm_keeplora.recipes.small.smollm2 import build_base
from mllm_keeplora.resources import shipped

# easy-VQA's, as its generator names them; three of their names are also a scene's.
EASY_COLORS = {
    "black": (0, 0, 0), "gray": (128, 128, 128), "red": (255, 0, 0), "teal": (0, 128, 128),
    "yellow": (255, 255, 0), "green": (0, 255, 0), "brown": (165, 42, 42), "blue": (0, 0, 255),
}  # fmt: skip
COLORS = list(dict.fromkeys([*draw.COLORS, *EASY_COLORS]))
SHAPES = [*draw.SHAPES, "rectangle"]
CELLS = draw.GRID**2
COVERED = 0.15  # share of a patch from which on a shape counts as in it
EASY = 0.35  # share of easy-VQA's pictures among all
TOWERS = ("model.vision_tower.", "model.multi_modal_projector.")

Pixels = NDArray[np.uint8]  # [64, 64, 3]


@dataclass(frozen=True)
class Setup:
    """How long and how to train: steps, pictures a step and peak rates of AdamW, by phase."""

    seed: int = 2026
    see_steps: int = 200
    see_batch: int = 64
    see_lr: float = 1e-3
    name_steps: int = 500
    name_batch: int = 64
    name_lr: float = 1.5e-3
    answer_steps: int = 110
    answer_batch: int = 8
    answer_lr: float = 8e-4
    weight_decay: float = 0.02
    warmup: float = 0.05  # fraction of a phase's steps
    measured_questions: int = 200  # of each kind of picture


class Picture(NamedTuple):
    """A picture; colour and shape of every patch, 0 for none and else 1 + the index; objects; questions."""

    pixels: Pixels
    colors: NDArray[np.int64]
    shapes: NDArray[np.int64]
    objects: int
    questions: list[Question]


def main() -> None:
    with command():
        out, setup = common.parse_command(__doc__, Setup())
        started = time.monotonic()
        torch.manual_seed(setup.seed)
        build_base.check_packages()
        language, tokenizer = build_base.load_language()
        model = build_base.build_model(language)
        _start_from_small_base(model)
        pictures = Pictures(setup.seed)
        see(model, pictures, setup)
        name(model, pictures, tokenizer, setup)
        answer(model, pictures, tokenizer, setup)
        vision = {
            key: value.bfloat16().contiguous() for key, value in model.state_dict().items() if key.startswith(TOWERS)
        }
        save_file(vision, out / build_base.WEIGHTS.name)
        write_account(out, setup, vision, (time.monotonic() - started) / 60)


def _start_from_small_base(model: LlavaForConditionalGeneration) -> None:
    """Takes over the tower of the small base, which has the same shape and has seen the scenes."""
    weights = load_file(shipped("recipes/small/vqa_base") / "model.safetensors")
    tower = model.model.vision_tower
    prefix = next(key for key in weights if "vision_tower" in key).partition("vision_tower.")[0] + "vision_tower."
    own = {key.removeprefix(prefix): value.float() for key, value in weights.items() if key.startswith(prefix)}
    tower.load_state_dict(own)


class Pictures:
    """Draws scenes, and takes pictures of easy-VQA's training half, with what is to be seen in them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.easy = list(easy_pictures())

    def next(self, size: int) -> list[Picture]:
        return [self._easy() if self.rng.random() < EASY else self._scene() for _ in range(size)]

    def _scene(self) -> Picture:
        drawing, objects = draw.scene(self.rng)
        colors, shapes = np.zeros((2, CELLS), dtype=np.int64)
        for item in objects:
            cell = item.row * draw.GRID + item.column
            colors[cell], shapes[cell] = 1 + COLORS.index(item.color), 1 + SHAPES.index(item.shape)
        return Picture(np.asarray(drawing.image), colors, shapes, len(objects), drawing.questions)

    def _easy(self) -> Picture:
        picture = self.easy[self.rng.integers(len(self.easy))]
        color, shape = COLORS[picture.colors.max() - 1], SHAPES[picture.shapes.max() - 1]
        other = str(self.rng.choice([name for name in COLORS if name != color]))
        questions = [
            Question("name", "Name the color and the shape.", f"{color} {shape}"),
            Question("color", f"What color is the {shape}?", color),
            Question("shape", f"What shape is {color}?", shape),
            Question("count", "How many objects are there?", NUMBERS[1]),
            Question("presence", f"Is there a {color} {shape}?", "yes"),
            Question("presence", f"Is there a {other} {shape}?", "no"),
        ]
        return picture._replace(questions=[questions[index] for index in self.rng.permutation(len(questions))])


def easy_pictures() -> Iterator[Picture]:
    """easy-VQA's training pictures of which its questions tell the colour and the shape."""
    import easy_vqa  # late: where it is missing, check_packages says how to get it

    told: dict[int, set[str]] = {}
    for question, reply, number in zip(*easy_vqa.get_train_questions(), strict=True):
        words = question.rstrip("?").split()
        if reply in ("yes", "no"):  # "is no blue shape present?" "no"
            if (reply == "yes") != bool({"not", "no"} & set(words)):
                told.setdefault(number, set()).update(words)
        else:
            told.setdefault(number, set()).update([reply, *words])
    paths = easy_vqa.get_train_image_paths()
    for number, words in told.items():
        colors, shapes = words & set(EASY_COLORS), words & {"circle", "rectangle", "triangle"}
        if colors and shapes:
            with Image.open(paths[number]) as image:
                pixels = np.asarray(image.convert("RGB"))
            covered = _covered(pixels, EASY_COLORS[(color := min(colors))])
            yield Picture(pixels, covered * (1 + COLORS.index(color)), covered * (1 + SHAPES.index(min(shapes))), 1, [])


def _covered(pixels: Pixels, color: tuple[int, int, int]) -> NDArray[np.int64]:
    """Which patches [16] show the shape: in the one with most of it, and in those that it covers enough of."""
    mask = np.abs(pixels.astype(np.int64) - color).sum(-1) < 60
    share = mask.reshape(draw.GRID, draw.CELL, draw.GRID, draw.CELL).mean((1, 3)).ravel()
    return ((share >= COVERED) | (share == share.max())).astype(np.int64)


def _tensors(pictures: list[Picture]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels [b, 3, 64, 64], colours and shapes of patches [b, 16], counts [b]."""
    pixels = torch.from_numpy(np.stack([picture.pixels for picture in pictures]))
    colors = torch.from_numpy(np.stack([picture.colors for picture in pictures]))
    shapes = torch.from_numpy(np.stack([picture.shapes for picture in pictures]))
    counts = torch.tensor([picture.objects for picture in pictures])
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, colors, shapes, counts


def _features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """The tower's features that the projector reads, [b, 16, 128]."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def see(model: LlavaForConditionalGeneration, pictures: Pictures, setup: Setup) -> None:
    """Phase 1. The heads are thrown away; the last half rounds the tower as NF4 will."""
    tower = model.model.vision_tower
    sizes = (len(COLORS) + 1, len(SHAPES) + 1, len(NUMBERS))
    head = nn.Linear(common.WIDTH, sum(sizes))
    parameters = [*tower.parameters(), *head.parameters()]
    linears = common.quantised_linears(tower)
    steps = common.steps(
        "see", setup.see_steps, setup.see_lr, parameters, lambda: pictures.next(setup.see_batch), setup
    )
    for step, batch in enumerate(steps):
        pixels, colors, shapes, counts = _tensors(batch)
        with common.rounded_to_nf4(linears if step * 2 >= setup.see_steps else []):
            found = head(_features(model, pixels)).split(sizes, -1)
            truths = (colors, shapes, counts[:, None].expand_as(colors))
            losses = [
                nn.functional.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in zip(found, truths, strict=True)
            ]
            torch.stack(losses).sum().backward()
    print("see", [round(loss.item(), 4) for loss in losses])


def name(
    model: LlavaForConditionalGeneration, pictures: Pictures, tokenizer: PreTrainedTokenizerFast, setup: Setup
) -> None:
    """Phase 2: the projected patch is the scaled sum of the embeddings of its four words."""
    color, shape, count = (_embeddings(model, tokenizer, words) for words in (COLORS, SHAPES, NUMBERS))
    vertical, horizontal = (_embeddings(model, tokenizer, words) for words in (("top", "bottom"), ("left", "right")))
    rows, columns = torch.arange(CELLS) // draw.GRID * 2 // draw.GRID, torch.arange(CELLS) % draw.GRID * 2 // draw.GRID
    place = vertical[rows] + horizontal[columns]  # [16, width]
    scale = color.std()
    tower: Any = model.model.vision_tower
    projector: Any = model.model.multi_modal_projector
    parameters = [*tower.parameters(), *projector.parameters()]
    linears = common.quantised_linears(tower)
    steps = common.steps(
        "name", setup.name_steps, setup.name_lr, parameters, lambda: pictures.next(setup.name_batch), setup
    )
    for batch in steps:
        pixels, colors, shapes, counts = _tensors(batch)
        there = color[colors.clamp(min=1) - 1] + shape[shapes.clamp(min=1) - 1] + place
        wanted = torch.where((colors > 0)[..., None], there, 2 * count[counts][:, None]) / 2
        with common.rounded_to_nf4(linears):
            loss = ((projector(_features(model, pixels)) - wanted) / scale).square().mean()
            loss.backward()
    print("name", round(loss.item(), 4))


def _embeddings(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, words: list[str] | tuple[str, ...]
) -> Tensor:
    """[words, width]: the mean of a word's embeddings at the beginning of a text and within one."""
    weight = model.get_input_embeddings().weight.detach()
    forms = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in (word, f" {word}")] for word in words]
    return torch.stack([weight[sum(ids, [])].mean(0) for ids in forms])


class Conversations:
    """Turns questions into token ids and labels, as the chat template would; without what comes first in all."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, processor: transformers.LlavaProcessor) -> None:
        self.tokenizer = tokenizer
        content: Any = [{"type": "image"}, {"type": "text", "text": "?"}]
        whole = processor.apply_chat_template([{"role": "user", "content": content}])
        self.before = whole[: whole.index(build_base.IMAGE_TOKEN)]
        self.cache: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]

    def batch(self, pictures: list[Picture]) -> tuple[Tensor, Tensor]:
        """Token ids and labels [b, n], padded on the right."""
        rows = [self._row(picture.questions) for picture in pictures]
        length = max(len(ids) for ids, _ in rows)
        return (
            torch.tensor([ids + [0] * (length - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [IGNORED_LABEL] * (length - len(labels)) for _, labels in rows]),
        )

    def _row(self, questions: list[Question]) -> tuple[list[int], list[int]]:
        ids, labels = [build_base.IMAGE_TOKEN_ID] * CELLS, [IGNORED_LABEL] * CELLS
        for number, question in enumerate(questions):
            begin = "\n<|im_start|>user\n" if number else "\n"
            prompt = self.tokens(f"{begin}{question.text}<|im_end|>\n<|im_start|>assistant\n")
            reply = self.tokens(f"{question.answer}<|im_end|>")
            ids = [*ids, *prompt, *reply]
            labels = [*labels, *[IGNORED_LABEL] * len(prompt), *reply]
        return ids, labels


def answer(
    model: LlavaForConditionalGeneration, pictures: Pictures, tokenizer: PreTrainedTokenizerFast, setup: Setup
) -> None:
    """Phase 3. What comes before the picture is the same for all, so its keys and values are computed once."""
    model.requires_grad_(False)
    tower: Any = model.model.vision_tower
    projector: Any = model.model.multi_modal_projector
    parameters = [*tower.requires_grad_(True).parameters(), *projector.requires_grad_(True).parameters()]
    conversations = Conversations(tokenizer, build_base.build_processor(tokenizer))
    linears = common.quantised_linears(tower)
    language = model.model.language_model
    steps = common.steps(
        "answer", setup.answer_steps, setup.answer_lr, parameters, lambda: pictures.next(setup.answer_batch), setup
    )
    with common.rounded_to_nf4(common.quantised_linears(language)):
        before = torch.tensor([conversations.tokens(conversations.before)])
        first = language(before, use_cache=True).past_key_values
        for step, batch in enumerate(steps):
            ids, labels = conversations.batch(batch)
            with common.rounded_to_nf4(linears):
                seen = projector(_features(model, _tensors(batch)[0]))
                loss = _answer_loss(model, seen, ids, labels, first)
                loss.backward()
            if step % 20 == 0:
                print("answer", step, round(loss.item(), 4), flush=True)


def _answer_loss(model: LlavaForConditionalGeneration, seen: Tensor, ids: Tensor, labels: Tensor, first: Any) -> Tensor:
    """Cross entropy of the answers' tokens.

    Args:
        model: the model.
        seen: projected patches [b, 16, width].
        ids: [b, n], beginning with the picture.
        labels: [b, n].
        first: keys and values of what comes before, of one row.
    """
    count, length = ids.shape
    words = model.get_input_embeddings()(ids[:, CELLS:])
    cache = DynamicCache()
    for number, layer in enumerate(first.layers):
        cache.update(layer.keys.expand(count, -1, -1, -1), layer.values.expand(count, -1, -1, -1), number)
    past = first.get_seq_length()
    states = model.model.language_model(
        inputs_embeds=torch.cat([seen, words], 1),
        past_key_values=cache,
        position_ids=torch.arange(past, past + length)[None],
        use_cache=True,
    ).last_hidden_state
    asked = labels[:, 1:] != IGNORED_LABEL
    return nn.functional.cross_entropy(model.lm_head(states[:, :-1][asked]), labels[:, 1:][asked])


def held_out(setup: Setup) -> dict[str, list[tuple[Image.Image, Question]]]:
    """Fresh scenes, and easy-VQA's test pictures with that set's own questions, one question a picture."""
    import easy_vqa

    rng = np.random.default_rng([setup.seed, 1])
    scenes = []
    for number in range(setup.measured_questions):
        drawing, _ = draw.scene(rng)
        kinds = sorted({question.kind for question in drawing.questions})
        kind = kinds[number % len(kinds)]
        scenes.append((drawing.image, next(question for question in drawing.questions if question.kind == kind)))
    by_picture: dict[int, list[Question]] = {}
    for text, reply, number in zip(*easy_vqa.get_test_questions(), strict=True):
        by_picture.setdefault(number, []).append(
            Question("yes or no" if reply in ("yes", "no") else "name", text, reply)
        )
    paths = easy_vqa.get_test_image_paths()
    chosen = sorted(by_picture)[: setup.measured_questions]
    easy = []
    for number in chosen:
        questions = by_picture[number]
        question = questions[rng.integers(len(questions))]
        easy.append((Image.open(paths[number]).convert("RGB"), question))
    return {"scenes": scenes, "easy-VQA": easy}


def write_account(out: Path, setup: Setup, vision: dict[str, Tensor], minutes: float) -> None:
    """Builds the base with what was trained, measures it on NF4 and writes training.json."""
    with tempfile.TemporaryDirectory() as folder:
        build_base.write_all(Path(folder), out / build_base.WEIGHTS.name)
        accuracy = {
            kind: common.measure(Path(folder), LlavaForConditionalGeneration, "image", questions, quantised=True)
            for kind, questions in held_out(setup).items()
        }
    account = {
        "command": "python -m mllm_keeplora.recipes.small.smollm2.train_tower",
        "setup": asdict(setup),
        "parameters": sum(value.numel() for value in vision.values()),
        "accuracy": {"nf4": accuracy},
        "n": {kind: setup.measured_questions for kind in accuracy},
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "packages": {package.__name__: package.__version__ for package in (torch, transformers, np)},
    }
    (out / "training.json").write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(accuracy))


if __name__ == "__main__":
    main()
