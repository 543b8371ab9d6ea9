"""Trains the embedded base model from scratch on drawn scenes and measures what it learnt.

    python recipes/embedded/train_base.py --out recipes/embedded/base_model

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

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# First of all imports: the package lets torchvision import beside a CPU-only torch, which transformers needs.
from mllm_keeplora.platform_guards import guard_linear4bit

# isort: split
import bitsandbytes.functional as bnb
import draw
import numpy as np
import torch
import transformers
from sklearn.datasets import load_digits
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    BitsAndBytesConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IGNORE = -100  # the label that cross entropy skips
SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
NOT_QUANTISED = ["model.multi_modal_projector", "lm_head"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' }}{%- endif -%}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{ '</s>' }}"
    "{%- elif message['role'] == 'system' -%}{{ ' ' }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
)
# Words that no drawing uses but a user's own questions may; anything else is spelt letter by letter.
COMMON_WORDS = (
    "a all an and answer any are as at background below big black brown by can centre closest color "
    "different do does each few first from give gray has have how image in it kind large last letter "
    "light line list look many most move moves moving name next no none number of on only option or other "
    "over phrase picture pink pointing question same second see show shown side single size small some "
    "than that the them these they thing third this to type under up use video what when where which "
    "white who whole why with word words you your above behind between darker down faster forward "
    "backward fast slow inside lighter longer lower middle more less outside shorter smaller upper"
)


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


class Batch(NamedTuple):
    """Drawn scenes: pixel_values [b, 3, 64, 64], input_ids and labels [b, n], classes of patches [b, 16]."""

    pixel_values: Tensor
    input_ids: Tensor
    labels: Tensor
    colors: Tensor
    shapes: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "base_model", help="folder to (re)write"
    )
    for name, default in Setup()._asdict().items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(default), default=default, help="see Setup"
        )
    arguments = vars(parser.parse_args())
    train_base(arguments.pop("out"), Setup(**arguments))


def train_base(out: Path, setup: Setup) -> None:
    """Trains, saves and measures the base model; `out` is replaced only by a finished model."""
    started = time.monotonic()
    torch.manual_seed(setup.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    batches = Batches(processor, np.random.default_rng(setup.seed))
    train_tower(model, batches, setup)
    train_language(model, batches, setup)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        model.bfloat16().save_pretrained(staging)
        processor.save_pretrained(staging)
        held_out = np.random.default_rng([setup.seed, 1])
        questions = [_held_out_question(held_out, index) for index in range(setup.measured_questions)]
        accuracy = {name: measure(staging, questions, quantised=name == "nf4") for name in ("fp32", "nf4")}
        _write_account(staging, setup, accuracy, model, minutes=(time.monotonic() - started) / 60)
        staging.chmod(0o755)  # mkdtemp's folder is private
        if out.exists():
            shutil.rmtree(out)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # nothing is left there after a successful rename
    print(f"wrote {out}: {json.dumps(accuracy)}")


def build_processor() -> LlavaProcessor:
    """The tokenizer (whole words where it knows them, else letters), image processor and chat template."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    vocabulary = [*SPECIAL_TOKENS, "user:", "assistant:", *pieces, *spoken_words()]
    tokens = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="<unk>", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,!]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
    )
    side = {"height": draw.SIZE, "width": draw.SIZE}
    image_processor = CLIPImageProcessor(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor,
        fast,
        patch_size=draw.CELL,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,  # the class token, which the "default" strategy drops again
    )


def spoken_words() -> list[str]:
    """Every word of the domains' questions and answers, then the common words, each once."""
    rng, scans = np.random.default_rng(0), load_digits()
    drawings = [draw.digit(rng, scans.images[index], int(scans.target[index])) for index in range(100)]
    for _ in range(500):  # far more than it takes to meet every word of every template
        drawings += [draw.scene(rng)[0], draw.chart(rng), draw.clock(rng), draw.ground(rng)]
    questions = [question for drawing in drawings for question in drawing.questions]
    words = " ".join(f"{question.text} {question.answer}" for question in questions)
    spoken = sorted(set(words.lower().replace("?", " ").replace(".", " ").split()) | {"say"})
    return list(dict.fromkeys([*spoken, *draw.NUMBERS, *COMMON_WORDS.split()]))


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
        self.processor = processor
        self.rng = rng
        self.words = [
            word for word in spoken_words() if word.isalpha() and word not in {*draw.COLORS, *draw.SHAPES}
        ]
        self.cache: dict[str, list[int]] = {}
        self.loose = False  # whether conversations hold a loose turn

    def next(self, size: int) -> Batch:
        scenes = [draw.scene(self.rng) for _ in range(size)]
        rows = [self._conversation(drawing.questions, objects) for drawing, objects in scenes]
        length = max(len(ids) for ids, _ in rows)
        pad = self.processor.tokenizer.pad_token_id
        classes = np.zeros((2, size, draw.GRID**2), dtype=np.int64)  # 0: no object in this patch
        for index, (_, objects) in enumerate(scenes):
            for item in objects:
                cell = item.row * draw.GRID + item.column
                classes[0, index, cell] = 1 + list(draw.COLORS).index(item.color)
                classes[1, index, cell] = 1 + draw.SHAPES.index(item.shape)
        pixels = np.stack([np.asarray(drawing.image) for drawing, _ in scenes])
        return Batch(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1,
            torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [IGNORE] * (length - len(labels)) for _, labels in rows]),
            *torch.from_numpy(classes),
        )

    def _conversation(
        self, questions: list[draw.Question], objects: list[draw.SceneObject]
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels of the questions as turns, with or without a loose turn among them."""
        turns = [(question.text, question.answer) for question in questions]
        if self.loose:
            turns.insert(int(self.rng.integers(len(turns) + 1)), self._loose_turn(objects))
        ids: list[int] = []
        labels: list[int] = []
        for index, (question, answer) in enumerate(turns):
            image = "" if index else "<image>" * draw.GRID**2 + "\n"
            prompt = self._tokens(f"USER: {image}{question} ASSISTANT:")
            completion = self._tokens(f" {answer}</s>")
            ids += prompt + completion
            labels += [IGNORE] * len(prompt) + completion
        return ids, labels

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

    def _tokens(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]


def train_tower(model: LlavaForConditionalGeneration, batches: Batches, setup: Setup) -> None:
    """Phase 1: the tower learns to see. The head on its features is thrown away."""
    tower = model.model.vision_tower
    classes = (draw.GRID**2, len(draw.COLORS) + 1, len(draw.SHAPES) + 1)  # no object: class 0
    head = nn.Linear(tower.config.hidden_size, sum(classes))
    parameters = [*tower.parameters(), *head.parameters()]
    steps = _steps("tower", setup.tower_steps, setup.tower_batch, setup.tower_lr, parameters, batches, setup)
    for batch in steps:
        features = tower(batch.pixel_values, output_hidden_states=True).hidden_states[-2][:, 1:]
        places = torch.arange(draw.GRID**2).expand_as(batch.colors)
        loss = torch.zeros(())
        for logits, truth in zip(
            head(features).split(classes, -1), (places, batch.colors, batch.shapes), strict=True
        ):
            loss = loss + nn.functional.cross_entropy(logits.flatten(0, 1), truth.flatten())
        loss.backward()


def train_language(model: LlavaForConditionalGeneration, batches: Batches, setup: Setup) -> None:
    """Phases 2 and 3, one learning-rate schedule over both."""
    total = setup.plain_steps + setup.language_steps + setup.rounded_steps
    linears = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(tuple(NOT_QUANTISED))
    ]
    steps = _steps("language", total, setup.batch, setup.lr, list(model.parameters()), batches, setup)
    for step, batch in enumerate(steps):
        batches.loose = step >= setup.plain_steps
        with rounded_to_nf4(linears if step >= total - setup.rounded_steps else []):
            loss = model(
                input_ids=batch.input_ids,
                pixel_values=batch.pixel_values,
                labels=batch.labels,
                use_cache=False,
            ).loss
            loss.backward()


def _steps(
    name: str,
    total: int,
    size: int,
    lr: float,
    parameters: list[nn.Parameter],
    batches: Batches,
    setup: Setup,
) -> Iterator[Batch]:
    """Yields one batch a step; the caller fills the gradients, this takes the AdamW step afterwards."""
    optimizer = torch.optim.AdamW(
        parameters, lr=lr, betas=(0.9, 0.98), weight_decay=setup.weight_decay, fused=True
    )
    warmup = max(1, round(setup.warmup * total))

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for _ in tqdm(range(total), desc=name, unit="step", disable=None):
        yield batches.next(size)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


@contextmanager
def rounded_to_nf4(linears: list[nn.Linear]) -> Iterator[None]:
    """Straight-through rounding: inside, the weights are those that NF4 with double quantisation would store.

    Afterwards they are what they were; gradients taken inside are gradients at the rounded weights and stay.
    """
    exact = [linear.weight.data for linear in linears]
    try:
        for linear in linears:
            linear.weight.data = bnb.dequantize_4bit(
                *bnb.quantize_4bit(linear.weight.data, compress_statistics=True, quant_type="nf4")
            )
        yield
    finally:
        for linear, weight in zip(linears, exact, strict=True):
            linear.weight.data = weight


def _held_out_question(rng: np.random.Generator, index: int) -> tuple[draw.Drawing, draw.Question]:
    """A fresh scene and one question about it, the kinds in turn."""
    drawing, _ = draw.scene(rng)
    kinds = sorted({question.kind for question in drawing.questions})
    kind = kinds[index % len(kinds)]
    return drawing, next(question for question in drawing.questions if question.kind == kind)


@torch.inference_mode()
def measure(
    folder: Path, questions: list[tuple[draw.Drawing, draw.Question]], quantised: bool
) -> dict[str, float]:
    """Accuracy of a saved model on single questions, greedily decoded: overall and by kind, as fractions."""
    processor = AutoProcessor.from_pretrained(folder)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=NOT_QUANTISED,
    )
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization if quantised else None
    ).eval()
    guard_linear4bit(model)
    right: dict[str, list[bool]] = {}
    for start in tqdm(range(0, len(questions), 50), desc="measuring", unit="batch", disable=None):
        part = questions[start : start + 50]
        content = [[{"type": "image"}, {"type": "text", "text": question.text}] for _, question in part]
        prompts = [
            processor.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True)
            for one in content
        ]
        images = [drawing.image for drawing, _ in part]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, question), answer in zip(part, answers, strict=True):
            right.setdefault(question.kind, []).append(answer.strip() == question.answer)
    scores = {kind: float(np.mean(hits)) for kind, hits in sorted(right.items())}
    return {"all": float(np.mean([hit for hits in right.values() for hit in hits])), **scores}


def _write_account(
    folder: Path, setup: Setup, accuracy: dict[str, dict[str, float]], model: nn.Module, minutes: float
) -> None:
    """Writes training.json and README.md: what was run, with what, and what was measured."""
    account: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "setup": setup._asdict(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "accuracy": accuracy,
        "n": setup.measured_questions,
        "minutes": round(minutes, 1),
        "threads": torch.get_num_threads(),
        "packages": {package.__name__: package.__version__ for package in (torch, transformers, np)},
    }
    (folder / "training.json").write_text(json.dumps(account, indent=2) + "\n", encoding="utf-8")
    kinds = list(accuracy["nf4"])
    table = [f"| weights | {' | '.join(kinds)} |", "|---" * (len(kinds) + 1) + "|"]
    table += [
        f"| {name} | {' | '.join(f'{row[kind]:.3f}' for kind in kinds)} |" for name, row in accuracy.items()
    ]
    lines = [
        "# Embedded base model",
        "",
        f"A LLaVA of {account['parameters']:,} parameters trained from scratch on drawn scenes, written by",
        "",
        f"    {account['command']}",
        "",
        f"(seed {setup.seed}, {account['minutes']} minutes on {account['threads']} threads). Accuracy on "
        f"{account['n']} held-out single questions, greedy decoding, exact match:",
        "",
        *table,
        "",
        "All settings and package versions are in `training.json`.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
