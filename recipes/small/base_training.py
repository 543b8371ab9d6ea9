"""What the training scripts of the two small base models share."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import bitsandbytes.functional as bnb
import numpy as np
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)

from mllm_keeplora.command_line import OptionParser
from mllm_keeplora.modeling.linear4bit import guard_linear4bit
from mllm_keeplora.modeling.loading import nf4_config
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.recipes.small import draw
from mllm_keeplora.recipes.small.draw import NUMBERS, Question
from mllm_keeplora.recipes.small.folders import whole_folder

NOT_QUANTISED = ["model.multi_modal_projector", "lm_head"]
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

WIDTH = 128  # of both towers
LAYERS = 4  # of the language model
_SIDE = {"height": draw.SIZE, "width": draw.SIZE}
# What both models' processors have in common: of images and frames, and of the whole.
PIXELS: dict[str, Any] = {"size": _SIDE, "crop_size": _SIDE, "do_center_crop": False}
PIXELS |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PROCESSOR: dict[str, Any] = {"patch_size": draw.CELL, "vision_feature_select_strategy": "default"}
# The class token, which the "default" strategy drops again.
PROCESSOR |= {"image_token": "<image>", "num_additional_image_tokens": 1}

B = TypeVar("B")


@dataclass(frozen=True)
class Setup:
    """How long and how to train. Steps and images (or clips) per step of each phase; peak rates of AdamW."""

    seed: int = 2026
    tower_steps: int = 600
    tower_batch: int = 64  # single frames of clips
    tower_lr: float = 2e-3
    plain_steps: int = 1200
    language_steps: int = 2200
    rounded_steps: int = 800
    batch: int = 32
    lr: float = 1.5e-3
    weight_decay: float = 0.02
    warmup: float = 0.05  # fraction of a phase's steps
    measured_questions: int = 1000


S = TypeVar("S", bound=Setup)


def parse_command(doc: str, defaults: S) -> tuple[Path, S]:
    """The command line of a training script: `--out` and one option per field of its setup."""
    parser = OptionParser(Path(sys.argv[0]).name, doc)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; an old one is replaced")
    for name, default in asdict(defaults).items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help="see Setup (default: %(default)s)")
    given = vars(parser.read(sys.argv[1:]))
    return given.pop("out"), type(defaults)(**given)


def train_base(
    out: Path,
    setup: S,
    processor: ProcessorMixin,
    build_model: Callable[[PreTrainedTokenizerFast], PreTrainedModel],
    train: Callable[[Any, Any, S], None],
    measure_all: Callable[[Path, S], dict[str, dict[str, float]]],
    *account: Any,
) -> None:
    """Trains, saves and measures a base model; `out` is replaced only by a finished model.

    Args:
        out: the folder to write.
        setup: how to train.
        processor: of the model; it is saved beside it.
        build_model: makes the untrained model for a tokenizer.
        train: trains a model with its processor.
        measure_all: the accuracy of a saved model, by row of its README's table, then by kind of question.
        account: title, description and notes for `write_account`.
    """
    started = time.monotonic()
    torch.manual_seed(setup.seed)
    model = build_model(processor.tokenizer)
    train(model, processor, setup)
    with whole_folder(out, replace=True) as staging:
        model.bfloat16().save_pretrained(staging)
        processor.save_pretrained(staging)
        accuracy = measure_all(staging, setup)
        minutes = (time.monotonic() - started) / 60
        write_account(staging, setup, accuracy, model, minutes, *account)
    print(f"wrote {out}: {json.dumps(accuracy)}")


def model_settings(tokenizer: PreTrainedTokenizerFast, vision_layers: int) -> dict[str, Any]:
    """What the configs of both models have in common. Every in_features is a multiple of 64, NF4's block size."""
    special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    size: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 256, "num_attention_heads": 4}
    vision = CLIPVisionConfig(
        num_hidden_layers=vision_layers, image_size=draw.SIZE, patch_size=draw.CELL, projection_dim=WIDTH, **size
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=LAYERS,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        **size,
        **special,
    )
    return {
        "vision_config": vision,
        "text_config": text,
        "image_token_index": tokenizer.get_vocab()["<image>"],
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "image_seq_length": draw.GRID**2,
        "tie_word_embeddings": False,
        **special,
    }


def words_of(questions: Iterable[Question]) -> list[str]:
    """Every word of the questions and answers, then the common words, each once."""
    words = " ".join(f"{question.text} {question.answer}" for question in questions)
    spoken = sorted(set(words.lower().replace("?", " ").replace(".", " ").split()) | {"say"})
    return list(dict.fromkeys([*spoken, *NUMBERS, *COMMON_WORDS.split()]))


def word_tokenizer(media_tokens: Sequence[str], words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lower-casing tokenizer that knows whole words and spells the others letter by letter.

    Args:
        media_tokens: placeholders of images and videos, special tokens after the four usual ones.
        words: the words it knows.
    """
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    special = ("<pad>", "<unk>", "<s>", "</s>", *media_tokens)
    vocabulary = [*special, "user:", "assistant:", *pieces, *words]
    tokens = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    tokenizer = Tokenizer(models.WordPiece(tokens, unk_token="<unk>", max_input_chars_per_word=64))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[?.,!]"), "isolated")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=list(media_tokens),
        padding_side="left",
        model_max_length=2048,
    )


def chat_template(*media: str) -> str:
    """The Jinja template of conversations; a message's media come first, in this order, then its text."""
    placeholders = "".join(
        f"{{%- for part in message['content'] if part['type'] == '{medium}' -%}}"
        f"{{{{ '<{medium}>\\n' }}}}{{%- endfor -%}}"
        for medium in media
    )
    return (
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'user' -%}{{ 'USER: ' }}"
        "{%- elif message['role'] == 'assistant' -%}{{ ' ASSISTANT: ' }}{%- endif -%}"
        "{%- if message['content'] is string -%}{{ message['content'] }}"
        "{%- else -%}"
        f"{placeholders}"
        "{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}"
        "{%- endif -%}"
        "{%- if message['role'] == 'assistant' -%}{{ '</s>' }}"
        "{%- elif message['role'] == 'system' -%}{{ ' ' }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
    )


class Talk:
    """Makes turns of the questions about a picture or clip, now and then with a loose turn among them."""

    def __init__(self, rng: np.random.Generator, words: Sequence[str]) -> None:
        self.rng = rng
        self.words = [word for word in words if word.isalpha() and word not in {*draw.COLORS, *draw.SHAPES}]
        self.loose = False  # whether conversations hold a loose turn

    def turns(self, questions: list[Question], colors: list[str], ways: Sequence[str] = ()) -> list[tuple[str, str]]:
        """The turns about things of these colours, which move these ways."""
        turns = [(question.text, question.answer) for question in questions]
        if self.loose:
            turns.insert(int(self.rng.integers(len(turns) + 1)), self._loose_turn(colors, ways))
        return turns

    def _loose_turn(self, colors: list[str], ways: Sequence[str]) -> tuple[str, str]:
        """A question around words that the scene does not explain.

        Without it the model answers only the exact wordings of the scenes, starts at zero on any other task
        and has no trained place for most words in the output layer, which LoRA does not reach.
        """
        first, second = (str(word) for word in self.rng.choice(self.words, size=2))
        about = f"{first} {second}" if self.rng.integers(2) else first
        color = str(self.rng.choice(colors if self.rng.integers(2) else list(draw.COLORS)))
        turns = [
            (f"Say {first}.", first),
            (f"What color is the {about}?", str(self.rng.choice(colors))),
            (f"How many {first} are there?", NUMBERS[len(colors)]),
            (f"Is there a {color} {first}?", "yes" if color in colors else "no"),
            (f"Is there {about}?", "no"),
        ]
        if ways:
            turns.append((f"Which way does the {about} move?", str(self.rng.choice(ways))))
        return turns[int(self.rng.integers(len(turns)))]


class Conversations:
    """Turns question-answer turns about one medium into token ids and labels, as the processor would."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, medium: str) -> None:
        self.tokenizer = tokenizer
        self.medium = medium  # the placeholder tokens, before the first question
        self.cache: dict[str, list[int]] = {}

    def batch(self, conversations: Iterable[list[tuple[str, str]]]) -> tuple[Tensor, Tensor]:
        """Token ids and labels [b, n], padded on the right; only answers have labels."""
        rows = [self._row(turns) for turns in conversations]
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return (
            torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [IGNORED_LABEL] * (length - len(labels)) for _, labels in rows]),
        )

    def _row(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for index, (question, answer) in enumerate(turns):
            medium = "" if index else f"{self.medium}\n"
            prompt = self._tokens(f"USER: {medium}{question} ASSISTANT:")
            completion = self._tokens(f" {answer}</s>")
            ids += prompt + completion
            labels += [IGNORED_LABEL] * len(prompt) + completion
        return ids, labels

    def _tokens(self, text: str) -> list[int]:
        if text not in self.cache:
            self.cache[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.cache[text]


def steps(
    name: str,
    total: int,
    lr: float,
    parameters: list[nn.Parameter],
    next_batch: Callable[[], B],
    setup: Setup,
) -> Iterator[B]:
    """Yields one batch a step; the caller fills the gradients, this takes the AdamW step afterwards."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=setup.weight_decay, fused=True)
    warmup = max(1, round(setup.warmup * total))

    def schedule(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / total)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    for _ in tqdm(range(total), desc=name, unit="step", disable=None):
        yield next_batch()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def quantised_linears(model: nn.Module, not_quantised: Sequence[str] = NOT_QUANTISED) -> list[nn.Linear]:
    """The linear layers whose weights are stored in NF4."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(tuple(not_quantised))
    ]


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


@torch.inference_mode()
def measure(
    folder: Path,
    model_class: type[PreTrainedModel],
    medium: str,
    questions: Sequence[tuple[Any, Question]],
    quantised: bool,
) -> dict[str, float]:
    """Accuracy of a saved model on single questions, greedily decoded: overall and by kind, as fractions.

    Args:
        folder: the saved model and processor.
        model_class: its class.
        medium: "image" or "video".
        questions: the image or the frames, and the question.
        quantised: load it in NF4, else in fp32.
    """
    processor = AutoProcessor.from_pretrained(folder)
    quantization = nf4_config("float32", NOT_QUANTISED)
    model = model_class.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantization if quantised else None
    ).eval()
    guard_linear4bit(model)
    right: dict[str, list[bool]] = {}
    for start in tqdm(range(0, len(questions), 50), desc="measuring", unit="batch", disable=None):
        part = questions[start : start + 50]
        content = [[{"type": medium}, {"type": "text", "text": question.text}] for _, question in part]
        prompts = [
            processor.apply_chat_template([{"role": "user", "content": one}], add_generation_prompt=True)
            for one in content
        ]
        media = {f"{medium}s": [shown for shown, _ in part]}
        inputs = processor(text=prompts, padding=True, return_tensors="pt", **media)
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (_, question), answer in zip(part, answers, strict=True):
            right.setdefault(question.kind, []).append(answer.strip() == question.answer)
    scores = {kind: float(np.mean(hits)) for kind, hits in sorted(right.items())}
    return {"all": float(np.mean([hit for hits in right.values() for hit in hits])), **scores}


def write_account(
    folder: Path,
    setup: Setup,
    accuracy: dict[str, dict[str, float]],
    model: nn.Module,
    minutes: float,
    title: str,
    description: str,
    notes: Sequence[str] = (),
    measured: str = "single questions, greedy decoding, exact match",
) -> None:
    """Writes training.json and README.md: what was run, with what, and what was measured.

    Args:
        folder: where to.
        setup: the script's settings.
        accuracy: by row of the README's table, then by kind of question.
        model: the trained model.
        minutes: what training and measuring took.
        title: the README's.
        description: what the model is, to follow its number of parameters: "A LLaVA of {parameters} ...".
        notes: paragraphs that follow the table.
        measured: what the accuracy is of.
    """
    account: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "setup": asdict(setup),
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
    table += [f"| {name} | {' | '.join(f'{row[kind]:.3f}' for kind in kinds)} |" for name, row in accuracy.items()]
    lines = [
        f"# {title}",
        "",
        f"{description.format(parameters=format(account['parameters'], ','))}, written by",
        "",
        f"    {account['command']}",
        "",
        f"(seed {setup.seed}, {account['minutes']} minutes on {account['threads']} threads). Accuracy on "
        f"{account['n']} held-out {measured}:",
        "",
        *table,
        "",
        *(line for note in notes for line in (note, "")),
        "All settings and package versions are in `training.json`.",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
