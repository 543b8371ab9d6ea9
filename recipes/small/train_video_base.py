"""Trains the small video base model from scratch on drawn clips and measures what it learnt.

    python -m mllm_keeplora.recipes.small.train_video_base --out recipes/small/video_base

A real `LlavaNextVideoForConditionalGeneration` of about 1.5 M parameters: a CLIP tower of 4 layers (features
of the third) whose 16 patches a frame are pooled to 4 tokens, a Llama language model of 4 layers, 8 frames.
Training has three phases, all on freshly drawn clips:

1. tower: a throw-away linear head on the pooled tokens of single frames says which colours and shapes are
   in each quarter of the picture, where, and which belong together;
2. language: conversations of six questions about a clip, loss on the answers only; after a while with a
   seventh question in words that the scenes do not use. The tower rests, and most clips of a step are met
   again with other questions: the tower's pass over eight frames costs twice the language model's. Beside it
   a throw-away head half way up the language model names, at every video token, what each colour and shape
   did since the frame before: answers alone say too little about motion to learn it in minutes;
3. rounded: both towers on new clips, with every weight that will be stored in NF4 rounded to NF4 in the
   forward pass and the gradient passed straight through, so that quantisation costs the finished model next
   to nothing.

Accuracy is then measured on held-out single questions about clips read back from H.264 files, greedily
decoded, by the saved model loaded in fp32 and in NF4, and once more with every clip replaced by one of its
frames. All of it is written to `training.json` and `README.md` beside the weights.
"""

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    LlavaNextImageProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mllm_keeplora.command_line import command
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from mllm_keeplora.recipes.small import base_training as common
from mllm_keeplora.recipes.small import draw, draw_video
from mllm_keeplora.recipes.small.build_video_data import read_mp4, write_mp4
from mllm_keeplora.recipes.small.draw import Question
from mllm_keeplora.recipes.small.draw_video import SIZE, SLOTS, Clip, Pixels, Thing

POOL = 2  # patches a side that become one token
QUARTERS = (SIZE // draw.CELL // POOL) ** 2  # video tokens a frame
SIDE = SIZE // 2  # pixels a side of a quarter
COLORS = list(draw.COLORS)
TRAITS = [*COLORS, *draw.SHAPES]  # no two things of a scene share one
STATES = (
    "elsewhere",
    "still",
    *draw_video.WAYS,
    "new",
    "newer",
    "gone",
)  # of a trait in a quarter at a frame


@dataclass(frozen=True)
class Setup(common.Setup):
    """Likewise for clips."""

    tower_steps: int = 1500
    tower_batch: int = 128
    plain_steps: int = 1300
    language_steps: int = 1200
    rounded_steps: int = 350
    remembered: int = 4096  # clips that may be met again in phase 2
    fresh: int = 8  # of them replaced by new ones each step
    motion_weight: float = 1.0  # of the throw-away motion head's loss


class Batch(NamedTuple):
    """Clips with conversations: input_ids and labels [b, n], states [b, 8, 4, 11], and what the model sees.

    That is `pixels` [b, 8, 3, 64, 64] or `pooled`, the tower's pooled features [b, 32, 128] of them.
    """

    input_ids: Tensor
    labels: Tensor
    states: Tensor
    pixels: Tensor | None = None
    pooled: Tensor | None = None


class Stills(NamedTuple):
    """Drawn frames: pixel_values [b, 3, 64, 64], and what _contents says of every frame, [b, ...]."""

    pixel_values: Tensor
    present: Tensor
    partners: Tensor
    places: Tensor


def main() -> None:
    with command():
        out, setup = common.parse_command(__doc__, Setup())
        account = ("Small video base model", _DESCRIPTION, [_NOTE])
        common.train_base(out, setup, build_processor(), build_model, _train, _measure_all, *account)


def _train(model: LlavaNextVideoForConditionalGeneration, processor: LlavaNextVideoProcessor, setup: Setup) -> None:
    batches = Batches(processor, np.random.default_rng(setup.seed))
    train_tower(model, batches, setup)
    train_language(model, batches, setup)


_DESCRIPTION = "A LLaVA-NeXT-Video of {parameters} parameters trained from scratch on drawn clips of eight frames"
_NOTE = (
    "Clips were read back from H.264 files. In the last row every clip was replaced by one of its eight "
    "frames, drawn at random and shown eight times, to the NF4 model: what remains is what a single frame "
    "gives away."
)


def build_processor() -> LlavaNextVideoProcessor:
    """The tokenizer (whole words where it knows them, else letters), media processors, chat template."""
    return LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**common.PIXELS),
        LlavaNextImageProcessor(image_grid_pinpoints=[[SIZE, SIZE]], **common.PIXELS),
        common.word_tokenizer(("<image>", "<video>"), spoken_words()),
        chat_template=common.chat_template("video", "image"),
        video_token="<video>",
        **common.PROCESSOR,
    )


_MORE_WORDS = "than they outrun"  # of races; no clip's questions hold them


@cache
def spoken_words() -> list[str]:
    """Every word of the domains' questions and answers, then the common words, each once."""
    rng, scan = np.random.default_rng(0), load_digits().images[0]
    clips: list[Clip] = []
    for _ in range(100):  # far more than it takes to meet every word of every template
        clips += [draw_video.scene(rng, draw_video.SAMPLED)[0], draw_video.drift(rng, scan, 0)]
        clips += [function(rng) for function in draw_video.DOMAINS.values()]
    questions = [question for clip in clips for question in clip.questions]
    return common.words_of([*questions, Question("", _MORE_WORDS, "")])


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaNextVideoForConditionalGeneration:
    """The untrained model."""
    config = LlavaNextVideoConfig(
        **common.model_settings(tokenizer, vision_layers=4),
        video_token_index=tokenizer.get_vocab()["<video>"],
        image_grid_pinpoints=[[SIZE, SIZE]],
        spatial_pool_stride=POOL,
        video_seq_length=QUARTERS * SLOTS,
    )
    return LlavaNextVideoForConditionalGeneration(config)


class Batches:
    """Draws training batches, tokenised as the processor would tokenise them."""

    def __init__(self, processor: LlavaNextVideoProcessor, rng: np.random.Generator) -> None:
        self.conversations = common.Conversations(processor.tokenizer, "<video>" * QUARTERS * SLOTS)
        self.rng = rng
        self.talk = common.Talk(rng, spoken_words())

    def clips(self, size: int) -> Batch:
        """One batch of new clips."""
        scenes = [draw_video.scene(self.rng, draw_video.SAMPLED) for _ in range(size)]
        batch = self._asked([(clip.questions, things) for clip, things in scenes])
        pixels = _as_decoded(np.concatenate([clip.frames for clip, _ in scenes]))
        return batch._replace(pixels=pixels.unflatten(0, (size, SLOTS)))

    def remembered(self, size: int, memory: "Memory") -> Batch:
        """One batch of clips from the memory, with questions of now."""
        chosen = self.rng.permutation(len(memory.scenes))[:size]
        scenes = [memory.scenes[index] for index in chosen]
        batch = self._asked([(draw_video.scene_questions(self.rng, things), things) for things in scenes])
        return batch._replace(pooled=memory.pooled[torch.from_numpy(chosen)])

    def _asked(self, scenes: list[tuple[list[Question], list[Thing]]]) -> Batch:
        ids, labels = self.conversations.batch(self._turns(*scene) for scene in scenes)
        return Batch(ids, labels, torch.from_numpy(np.stack([_states(things) for _, things in scenes])))

    def stills(self, size: int) -> Stills:
        """One batch of single frames, each of another clip."""
        pixels, truths = [], []
        for _ in range(size):
            frame = self.rng.choice(draw_video.SAMPLED, 1)
            clip, things = draw_video.scene(self.rng, frame)
            pixels.append(clip.frames[0])
            truths.append(_contents(things, frame))
        present, partners, places = (torch.from_numpy(np.stack(part)) for part in zip(*truths, strict=True))
        return Stills(_as_decoded(np.stack(pixels)), present, partners, places)

    def _turns(self, questions: list[Question], things: list[Thing]) -> list[tuple[str, str]]:
        ways = [thing.act for thing in things if thing.act in draw_video.WAYS]
        return self.talk.turns(questions, [thing.color for thing in things], ways)


class Memory:
    """Scenes and what the resting tower sees of them, [n, 32, 128]; the oldest give way to new ones."""

    def __init__(self, model: LlavaNextVideoForConditionalGeneration, rng: np.random.Generator, size: int) -> None:
        self.model = model
        self.rng = rng
        self.oldest = 0
        self.scenes: list[list[Thing]] = [[] for _ in range(size)]
        self.pooled = torch.empty(size, QUARTERS * SLOTS, common.WIDTH)

    @torch.no_grad()
    def refresh(self, count: int) -> None:
        """Replaces the `count` oldest scenes."""
        places = [(self.oldest + index) % len(self.scenes) for index in range(count)]
        drawn = [draw_video.scene(self.rng, draw_video.SAMPLED) for _ in places]
        pixels = _as_decoded(np.concatenate([clip.frames for clip, _ in drawn]))
        self.pooled[places] = pooled(self.model, pixels).view(count, QUARTERS * SLOTS, -1)
        for place, (_, things) in zip(places, drawn, strict=True):
            self.scenes[place] = things
        self.oldest = (self.oldest + count) % len(self.scenes)


def pooled(model: LlavaNextVideoForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the tower sees of frames [n, 3, 64, 64], pooled to quarters: [n, 4, 128]."""
    seen = model.model.vision_tower(pixels, output_hidden_states=True)
    return model.model.vision_resampler(seen.hidden_states[model.config.vision_feature_layer][:, 1:])


def _as_decoded(pixels: Pixels) -> Tensor:
    """What the model is given of frames [n, height, width, 3] from a file: in -1..1, [n, 3, height, width].

    A file holds one colour for every four pixels (4:2:0), and brightness for each.
    """
    exact = torch.from_numpy(pixels).movedim(-1, -3).float() / 127.5 - 1
    brightness = (exact * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(-3, keepdim=True)
    color = nn.functional.avg_pool2d(exact - brightness, 2)
    return brightness + color.repeat_interleave(2, -1).repeat_interleave(2, -2)


def _quarters(centres: NDArray[np.int64]) -> NDArray[np.int64]:
    """Which quarter of the picture each centre [n, 2] lies in."""
    return centres[:, 0] // SIDE * 2 + centres[:, 1] // SIDE


def _contents(
    things: list[Thing], frame: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.float32]]:
    """What the quarters of one frame show of each trait.

    Returns:
        Whether it is there [4, 11], the other trait of the thing that has it [4, 11] and where in the
        quarter that thing is, 0 to 1 [4, 11, 2].
    """
    present = np.zeros((QUARTERS, len(TRAITS)), dtype=np.bool_)
    partners = np.zeros((QUARTERS, len(TRAITS)), dtype=np.int64)
    places = np.zeros((QUARTERS, len(TRAITS), 2), dtype=np.float32)
    for thing in things:
        if thing.shown[frame[0] // 2]:
            centre = thing.centres(frame)
            quarter, traits = int(_quarters(centre)[0]), _traits(thing)
            present[quarter, traits] = True
            partners[quarter, traits] = traits[::-1]
            places[quarter, traits] = centre[0] % SIDE / SIDE
    return present, partners, places


def _traits(thing: Thing) -> list[int]:
    return [TRAITS.index(thing.color), TRAITS.index(thing.shape)]


def _states(things: list[Thing]) -> NDArray[np.int64]:
    """What each trait's thing does in each quarter at each sampled frame, places in STATES, [8, 4, 11].

    Nothing happens at the first frame, so it is not asked about. A thing that comes into view is "newer" if
    another came into view in an earlier slot.
    """
    states = np.zeros((SLOTS, QUARTERS, len(TRAITS)), dtype=np.int64)
    arrivals = [slot for thing in things for slot in np.flatnonzero(np.diff(thing.shown.astype(np.int8)) == 1) + 1]
    for thing in things:
        traits, quarters = _traits(thing), _quarters(thing.centres(draw_video.SAMPLED))
        act = thing.act if thing.act in draw_video.WAYS else "still"
        for slot in range(1, SLOTS):
            before, now = thing.shown[slot - 1 : slot + 1]
            if now and not before:
                states[slot, quarters[slot], traits] = STATES.index("newer" if min(arrivals) < slot else "new")
            elif now or before:
                states[slot, quarters[slot], traits] = STATES.index(act if now else "gone")
    states[0] = IGNORED_LABEL
    return states


def train_tower(model: LlavaNextVideoForConditionalGeneration, batches: Batches, setup: Setup) -> None:
    """Phase 1: the tower learns to see. The head on its pooled features is thrown away."""
    sizes = (1, len(TRAITS), 2)  # presence, partner and place of each trait
    head = nn.Linear(common.WIDTH, len(TRAITS) * sum(sizes))
    steps = common.steps(
        "tower",
        setup.tower_steps,
        setup.tower_lr,
        [*model.model.vision_tower.parameters(), *head.parameters()],
        lambda: batches.stills(setup.tower_batch),
        setup,
    )
    for batch in steps:
        features = pooled(model, batch.pixel_values)
        presence, partners, places = head(features).unflatten(-1, (len(TRAITS), -1)).split(sizes, -1)
        here = batch.present
        loss = nn.functional.binary_cross_entropy_with_logits(presence.squeeze(-1), here.float())
        loss = loss + nn.functional.cross_entropy(partners[here], batch.partners[here])
        loss = loss + 4 * nn.functional.l1_loss(places[here], batch.places[here])
        loss.backward()


def train_language(model: LlavaNextVideoForConditionalGeneration, batches: Batches, setup: Setup) -> None:
    """Phases 2 and 3, one learning-rate schedule over both."""
    resting = setup.plain_steps + setup.language_steps
    linears = common.quantised_linears(model)
    head = nn.Linear(common.WIDTH, len(TRAITS) * len(STATES))
    memory = Memory(model, batches.rng, setup.remembered)
    for _ in tqdm(range(setup.remembered // 64), desc="memory", unit="64 clips", disable=None):
        memory.refresh(64)
    step = 0

    def next_batch() -> Batch:
        batches.talk.loose = step >= setup.plain_steps
        if step >= resting:
            return batches.clips(setup.batch)
        memory.refresh(setup.fresh)
        return batches.remembered(setup.batch, memory)

    parameters = [*model.parameters(), *head.parameters()]
    total = resting + setup.rounded_steps
    for batch in common.steps("language", total, setup.lr, parameters, next_batch, setup):
        with common.rounded_to_nf4(linears if step >= resting else []):
            loss = _language_loss(model, head, batch, setup.motion_weight)
            loss.backward()
        step += 1


def _language_loss(
    model: LlavaNextVideoForConditionalGeneration, head: nn.Linear, batch: Batch, motion_weight: float
) -> Tensor:
    """Cross entropy of the answers, and that of the head's account of the motion."""
    seen: dict[str, Any] = {"pixel_values_videos": batch.pixels}
    if batch.pooled is not None:
        projected = model.model.multi_modal_projector(batch.pooled)
        seen = {"mm_encoder_outputs": {"video": BaseModelOutputWithPooling(pooler_output=projected)}}
    output = model(input_ids=batch.input_ids, labels=batch.labels, use_cache=False, output_hidden_states=True, **seen)
    middle = output.hidden_states[common.LAYERS // 2]
    states = head(middle[batch.input_ids == model.config.video_token_index]).view(-1, len(STATES))
    weights = torch.tensor([0.1, *[1.0] * (len(STATES) - 1)])  # most are elsewhere
    motion = nn.functional.cross_entropy(states, batch.states.flatten(), weights, ignore_index=IGNORED_LABEL)
    return output.loss + motion_weight * motion


def _measure_all(folder: Path, setup: Setup) -> dict[str, dict[str, float]]:
    """Accuracy on held-out questions in fp32, in NF4, and in NF4 on a single frame of each clip."""
    rng = np.random.default_rng([setup.seed, 1])
    questions = held_out_questions(rng, setup.measured_questions)
    frozen = [(frames[rng.integers(SLOTS)][None].repeat(SLOTS, 0), question) for frames, question in questions]
    rows = {"fp32": (questions, False), "nf4": (questions, True), "nf4, one frame": (frozen, True)}
    return {
        name: common.measure(folder, LlavaNextVideoForConditionalGeneration, "video", asked, quantised)
        for name, (asked, quantised) in rows.items()
    }


def held_out_questions(rng: np.random.Generator, count: int) -> list[tuple[Pixels, Question]]:
    """Sampled frames of fresh clips, decoded from H.264 files, and one question each, the kinds in turn."""
    questions = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        for index in range(count):
            clip = draw_video.asked_scene(rng, index)
            write_mp4(path, clip.frames)
            questions.append((read_mp4(path)[draw_video.SAMPLED], clip.questions[0]))
    return questions


if __name__ == "__main__":
    main()
