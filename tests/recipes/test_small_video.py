"""What ships for video: a base model with general ability on NF4, clips that no single frame answers."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.linear_model import RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mllm_keeplora.data.records import load_records
from mllm_keeplora.recipes.small import base_training, build_video_data, draw, draw_video, train_video_base
from tests import forked
from tests.recipes.conftest import ROOT, TEST, TRAIN, build_video

BASE = ROOT / "recipes" / "small" / "video_base"
TASKS = ("drift", "lamps", "beacons", "race")
ASKED = 80  # of each test half; every seventh of the general questions is of one kind
MOTION = ("change", "direction", "flashes", "mover", "order")  # general questions that need more than a frame


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small video stream's data, with the first clips alone of every half."""
    root, write = tmp_path_factory.mktemp("built"), build_video_data._write_clips

    def write_few(folder: Path, drawer: Any, count: int, *others: Any) -> Any:
        return write(folder, drawer, TRAIN if folder.name == "train" else min(count, ASKED), *others)

    with mock.patch.object(build_video_data, "_write_clips", write_few):
        build_video_data.write_all(root)
    return root


# The base model.


def test_the_shipped_base_has_general_ability_on_nf4(built: Path) -> None:
    values = {task: accuracy(built / task) for task in ("motions", *TASKS)}
    assert values["motions"] >= 0.8
    learnable = [task for task in TASKS if 0.1 <= values[task] <= 0.7]
    assert len(learnable) >= 2, f"Transfer needs tasks on which the base scores, and room to learn: {values}"


def accuracy(task: Path) -> float:
    """The NF4 base's on a built test set, as a fraction."""
    from transformers import LlavaNextVideoForConditionalGeneration

    sampled = draw_video.SAMPLED
    asked = json.loads((task / "json_row/test_questions.json").read_text())
    answers = json.loads((task / "json_row/test_answers.json").read_text())
    questions = [
        (
            build_video_data.read_mp4(task / "videos" / f"{record['video_name']}.mp4")[sampled],
            draw.Question("any", record["question"], answer["answer"]),
        )
        for record, answer in zip(asked, answers, strict=True)
    ]
    return float(
        base_training.measure(BASE, LlavaNextVideoForConditionalGeneration, "video", questions, quantised=True)["all"]
    )


def test_the_shipped_base_is_small_and_fits_nf4_blocks() -> None:
    from transformers import LlavaNextVideoForConditionalGeneration

    assert sum(path.stat().st_size for path in BASE.iterdir()) < 4e6
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(BASE)
    assert all(m.in_features % 64 == 0 for m in model.modules() if hasattr(m, "in_features"))


def test_the_account_shows_ability_that_one_frame_does_not_give() -> None:
    account = json.loads((BASE / "training.json").read_text())
    assert {"command", "setup", "n"} <= set(account)
    assert "seed" in account["setup"]
    whole, one = account["accuracy"]["nf4"], account["accuracy"]["nf4, one frame"]
    assert whole["all"] >= 0.8
    assert np.mean([whole[kind] for kind in MOTION]) - np.mean([one[kind] for kind in MOTION]) >= 0.4
    assert one["direction"] <= 0.25 + 0.15, "four ways: chance is 0.25"


def test_the_script_still_makes_the_shipped_vocabulary() -> None:
    """A new word in a question would need the base to be trained again."""
    processor = train_video_base.build_processor()
    shipped = json.loads((BASE / "tokenizer.json").read_text())["model"]["vocab"]
    assert processor.tokenizer.get_vocab() == shipped
    assert processor.chat_template == (BASE / "chat_template.jinja").read_text()


def test_the_processor_takes_videos_and_images() -> None:
    from transformers import AutoProcessor, LlavaNextVideoForConditionalGeneration

    processor = AutoProcessor.from_pretrained(BASE)
    model = LlavaNextVideoForConditionalGeneration.from_pretrained(BASE)
    media: dict[str, Any] = {
        "video": np.zeros((8, 64, 64, 3), dtype=np.uint8),
        "image": Image.new("RGB", (100, 60)),
    }
    for kind, medium in media.items():
        content = [{"type": kind}, {"type": "text", "text": "What moves?"}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert prompt == f"USER: <{kind}>\nWhat moves? ASSISTANT:"
        inputs = processor(text=[prompt], return_tensors="pt", **{f"{kind}s": [medium]})
        if kind == "video":
            assert (inputs["input_ids"] == model.config.video_token_index).sum() == 32
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert output.shape[1] > inputs["input_ids"].shape[1]


def test_a_longer_conversation_begins_with_the_shorter_one() -> None:
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(BASE)
    turns = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What moves?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red circle"}]},
        {"role": "user", "content": [{"type": "text", "text": "Which way does it move?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
    ]
    rendered = [processor.apply_chat_template(turns[:count]) for count in range(1, 5)]
    assert all(longer.startswith(shorter) for shorter, longer in zip(rendered, rendered[1:], strict=False))
    assert processor.apply_chat_template(turns[:1], add_generation_prompt=True) == f"{rendered[0]} ASSISTANT:"
    assert processor.tokenizer.padding_side == "left"


# The data.


def digest(root: Path) -> str:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(str(p.relative_to(root)).encode() + p.read_bytes() for p in files)).hexdigest()


def test_the_builder_is_deterministic(video_data_root: Path, tmp_path: Path) -> None:
    """Some hundred clips, in two processes."""
    build_video(tmp_path / "again", TRAIN, TEST, TEST)
    assert digest(tmp_path / "again") == digest(video_data_root)


def test_the_builder_does_not_touch_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    assert forked.run(["recipes/small/build_video_data.py", "--out", tmp_path]).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("task", TASKS)
def test_training_records_have_the_published_form(built: Path, task: str) -> None:
    records = json.loads((built / task / "json_row/train_data.json").read_text())
    assert len(records) == TRAIN and 600 <= build_video_data.TRAIN_CLIPS <= 1200
    for record in records:
        assert set(record) == {"id", "video", "conversations"}
        assert (built / task / "videos" / record["video"]).is_file()
        turns = record["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert [turn["value"].startswith("<video>\n") for turn in turns[::2]] == [True] + [False] * (
            len(turns) // 2 - 1
        )
        assert all(1 <= len(turn["value"].split()) <= 2 for turn in turns[1::2])


@pytest.mark.parametrize("task", ["motions", *TASKS])
def test_test_records_are_paired_by_position(built: Path, task: str) -> None:
    asked = json.loads((built / task / "json_row/test_questions.json").read_text())
    answers = json.loads((built / task / "json_row/test_answers.json").read_text())
    assert len(asked) == len(answers) == ASKED
    assert build_video_data.TEST_QUESTIONS >= 200 and build_video_data.GENERAL_QUESTIONS >= 300
    assert [record["question_id"] for record in asked] == list(range(len(asked)))
    assert all(set(record) == {"video_name", "question", "question_id"} for record in asked)
    assert all(set(answer) == {"answer"} for answer in answers)
    assert all((built / task / "videos" / f"{record['video_name']}.mp4").is_file() for record in asked)


def test_general_samples_are_other_clips_than_the_tested(built: Path) -> None:
    samples, _ = load_records(built / "motions/general.json", built / "motions", answered=False, checker=None)
    assert len(samples) == ASKED and build_video_data.GENERAL_SAMPLES >= 128

    def clips(half: str) -> set[bytes]:
        return {path.read_bytes() for path in (built / "motions/videos" / half).iterdir()}

    assert len(clips("general")) == ASKED and not clips("general") & clips("test")


def test_clips_are_h264_and_keep_what_was_drawn(tmp_path: Path) -> None:
    frames = draw_video.asked_scene(np.random.default_rng(0), 0).frames
    build_video_data.write_mp4(tmp_path / "clip.mp4", frames)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
    decoded = build_video_data.read_mp4(tmp_path / "clip.mp4")
    assert decoded.shape == frames.shape == (16, 64, 64, 3)
    assert np.abs(decoded.astype(int) - frames).mean() < 8  # of 255; colours are stored at half resolution


# No single frame answers: a learner that knows the whole clip from the order of its frames fails on any one.

# Per frame of a clip, what a simple learner is shown [8, k], and the class that it has to tell.
Shown = tuple[NDArray[np.floating], str]


def coarse(frames: NDArray[np.uint8], columns: int = 8) -> NDArray[np.floating]:
    """Brightness on a grid of 8 rows, [n, 8 * columns], in 0..1."""
    n, height, width, _ = frames.shape
    cells = frames.mean(-1).reshape(n, 8, height // 8, columns, width // columns)
    return cells.mean((2, 4)).reshape(n, -1) / 255


def colored(frames: NDArray[np.uint8], color: tuple[int, int, int]) -> NDArray[np.bool_]:
    return np.abs(frames.astype(int) - color).max(-1) < 60


def show_all(frames: NDArray[np.uint8], text: str, answer: str, colors: Any) -> Shown:
    return coarse(frames), answer


def show_beacons(frames: NDArray[np.uint8], text: str, answer: str, colors: Any) -> Shown:
    """The half with the light that is asked about."""
    light = colored(frames, next(rgb for color, rgb in colors.items() if color in text)).any(0)
    left = light[:, :32].sum() > light[:, 32:].sum()
    return coarse(frames[:, :, :32] if left else frames[:, :, 32:], columns=4), answer


def show_race(frames: NDArray[np.uint8], text: str, answer: str, colors: Any) -> Shown:
    runner = colored(frames[:1], colors[answer])[0]
    return coarse(frames), "upper" if runner[:32].sum() > runner[32:].sum() else "lower"


def products(one: NDArray[np.floating], other: NDArray[np.floating]) -> NDArray[np.floating]:
    return (one[:, :, None] * other[:, None, :]).reshape(len(one), -1)


def best_score(features: NDArray[np.floating], classes: NDArray[np.str_]) -> float:
    """The better of trees and a linear classifier, trained on two thirds, tested on the rest."""
    split = len(classes) * 2 // 3
    learners = (
        ExtraTreesClassifier(60, random_state=0),
        make_pipeline(StandardScaler(), RidgeClassifier(alpha=1e4)),
    )
    return max(
        learner.fit(features[:split], classes[:split]).score(features[split:], classes[split:]) for learner in learners
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind", "show", "chance"),
    [
        ("drift", "way", show_all, 1 / 4),
        ("lamps", "first", show_all, 1 / 4),
        ("beacons", "left", show_beacons, 1 / 3),
        ("race", "faster", show_race, 1 / 2),
    ],
)
def test_no_single_frame_answers_the_main_question(
    task: str, kind: str, show: Callable[..., Shown], chance: float
) -> None:
    """Same learner, same second-order features: of one frame with itself, or of each frame with the next."""
    rng, scans = np.random.default_rng(5), load_digits().images
    draw_clip = draw_video.DOMAINS.get(task, lambda rng: draw_video.drift(rng, scans[rng.integers(1700)], 0))
    shown, classes = [], []
    for _ in range(900):
        clip = draw_clip(rng)
        question = next(question for question in clip.questions if question.kind == kind)
        frames = clip.frames[draw_video.SAMPLED]
        seen, truth = show(frames, question.text, question.answer, draw_video.COLORS)
        shown.append(seen)
        classes.append(truth)
    x, y = np.stack(shown), np.array(classes)
    single = max(best_score(np.concatenate([x[:, t], products(x[:, t], x[:, t])], 1), y) for t in range(x.shape[1]))
    steps = [products(x[:, t], x[:, t + 1]) for t in range(x.shape[1] - 1)]
    whole = best_score(np.concatenate([np.abs(np.diff(x, axis=1)).mean(1), sum(steps[:3]), sum(steps)], 1), y)
    # 300 tests and 16 tries: chance alone reaches 3 standard errors, 0.09.
    assert single <= chance + 0.1, f"one frame reaches {single:.2f}"
    assert whole >= chance + 0.35, f"all frames reach only {whole:.2f}"
