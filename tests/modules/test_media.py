"""Pictures and clips on their way into a model: the same everywhere, and as each of the families takes them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllm_keeplora.commands import chat
from mllm_keeplora.config import EvaluationConfig, ModelConfig, ProbeConfig, RunConfig, TrainConfig, VideoConfig
from mllm_keeplora.data.collator import ChatCollator, ProcessorError, prepare_questions, process_media
from mllm_keeplora.data.conversation import MediaFile, Message
from mllm_keeplora.data.preflight import IMAGES_ONLY
from mllm_keeplora.data.video.reader import Clip, VideoReader
from mllm_keeplora.errors import ConfigError
from mllm_keeplora.eval.tasks import utils
from mllm_keeplora.evaluation import lmms_model
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.modeling.families import FAMILIES, check_clip_lengths
from tests import clips
from tests.conversations import Turn, ask, sample
from tests.modules.tiny_families import BUILDERS, WRITING

OF_CLIPS = [family for family in FAMILIES if "video" in FAMILIES[family].vision_layers]
OF_ONE_LENGTH = [family for family in OF_CLIPS if not FAMILIES[family].clips_of_any_length]
TURNS = (Turn("what is this ?", "red"),)


@pytest.fixture(scope="module")
def processors() -> dict[str, Any]:
    return {family: BUILDERS[family]()[1] for family in WRITING}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def clip_of(frames: int, height: int = 32, width: int = 48, **timing: Any) -> Clip:
    return Clip(noise(frames, height, width), tuple(range(frames)), 8.0, frames, **timing)


def pixel_values(inputs: Any) -> torch.Tensor:
    [key] = [key for key in inputs if key.startswith("pixel_values")]
    return torch.as_tensor(inputs[key])


# --- Every way in ---


def pictures_in(value: Any) -> Iterator[Image.Image]:
    if isinstance(value, Image.Image):
        yield value
    elif isinstance(value, Message):
        yield from pictures_in(value.parts)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from pictures_in(item)


def asked_about(path: Path) -> dict[str, Any]:
    """A document of our own tasks."""
    parts = [{"type": "image", "path": str(path)}, {"type": "text", "text": "what ?"}]
    return {utils.ASKED: [{"role": "user", "content": parts}]}


def as_evaluation_shows_it(url: Any, processor: Any, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    """The picture that the wrapper of lmms-eval gives the processor for a message with `url`."""
    shown: list[Image.Image] = []

    def stop(_: Any, questions: Any, *rest: Any) -> None:
        shown.extend(pictures_in(questions))
        raise RuntimeError("seen")

    monkeypatch.setattr(lmms_model, "prepare_questions", stop)
    wrapper = lmms_model.KeepLoRAModel(torch.nn.Linear(1, 1), processor)
    wrapper.task_dict = {"t": {"test": {0: {}}}}
    parts = [{"type": "image", "url": url}, {"type": "text", "text": "what ?"}]
    request = type("Request", (), {"task_name": "t", "doc_id": 0})()
    request.args = ("what ?", lambda doc: [{"role": "user", "content": parts}], {}, 0, "t", "test")
    with pytest.raises(EvaluationError, match="seen"):
        wrapper.generate_until([request])
    return shown[0]


def on_its_side(path: Path) -> Path:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(24, 40)).save(path, exif=exif)
    return path


def on_clear_ground(path: Path) -> Path:
    picture = Image.new("RGBA", (40, 24), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (10, 5, 20, 15))
    picture.save(path)
    return path


def of_16_bits(path: Path) -> Path:
    Image.fromarray((np.arange(24 * 40, dtype=np.uint16) * 68).reshape(24, 40)).save(path)
    return path


def expected(path: Path) -> np.ndarray:
    """By hand, for the three above."""
    if path.name.startswith("side"):
        return noise(24, 40).swapaxes(0, 1)[:, ::-1]
    if path.name.startswith("clear"):
        picture = np.full((24, 40, 3), 255, np.uint8)
        picture[5:15, 10:20] = 0
        return picture
    levels = np.round(np.arange(24 * 40) * 68 / 257).astype(np.uint8).reshape(24, 40, 1)
    return np.repeat(levels, 3, axis=2)


MAKE = {"side.png": on_its_side, "side.tif": on_its_side, "clear.png": on_clear_ground, "deep.png": of_16_bits}


@pytest.mark.parametrize("name", MAKE)
def test_a_picture_is_the_same_in_training_evaluation_and_chat(
    name: str, tmp_path: Path, processors: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = MAKE[name](tmp_path / name)
    right, llava = expected(path), processors["llava"]
    doc = asked_about(path)
    shown = {
        "our tasks": utils.doc_to_visual(doc)[0],
        "chat": chat._open(None, path, None),
        "evaluation, by path": as_evaluation_shows_it(str(path), llava, monkeypatch),
        "evaluation, as a benchmark opens it": as_evaluation_shows_it(Image.open(path), llava, monkeypatch),
        "evaluation of our tasks": as_evaluation_shows_it(utils.doc_to_visual(doc)[0], llava, monkeypatch),
    }
    for where, picture in shown.items():
        np.testing.assert_array_equal(np.asarray(picture), right, err_msg=where)
    batch = ChatCollator(llava)([sample("1", path, TURNS)])
    alone = process_media(llava, [[Image.fromarray(right)]], [])
    assert torch.equal(pixel_values(batch), pixel_values(alone))
    assert IMAGES_ONLY.media([MediaFile("image", path)], "x") == {}


@pytest.mark.parametrize("make", [lambda p: Image.new("F", (9, 9)).save(p), lambda p: p.write_text("<html>404")])
def test_what_the_check_refuses_every_way_in_refuses(make: Any, tmp_path: Path, processors: dict[str, Any]) -> None:
    path = tmp_path / "a.tif"
    make(path)
    [reason] = IMAGES_ONLY.media([MediaFile("image", path)], "x").values()
    for read in (
        lambda: ChatCollator(processors["llava"])([sample("1", path, TURNS)]),
        lambda: utils.doc_to_visual(asked_about(path)),
        lambda: chat._open(None, path, None),
    ):
        with pytest.raises(ValueError) as caught:
            read()
        assert reason in str(caught.value)


# --- Sizes ---


@pytest.mark.parametrize("family", WRITING)
@pytest.mark.parametrize(("height", "width"), [(1, 150), (150, 1), (3, 300), (300, 3), (3, 3), (1, 1), (2, 90)])
def test_a_thin_picture_is_not_taken_for_one_with_its_channels_first(
    family: str, height: int, width: int, processors: dict[str, Any]
) -> None:
    processor, picture = processors[family], noise(height, width)
    found = pixel_values(process_media(processor, [[Image.fromarray(picture)]], []))
    tiles = {"crop_to_patches": True} if family == "internvl" else {}
    told = processor.image_processor(
        picture.transpose(2, 0, 1), input_data_format="channels_first", return_tensors="pt", **tiles
    )
    assert torch.equal(found, pixel_values(told))


@pytest.mark.parametrize("family", OF_CLIPS)
@pytest.mark.parametrize(("height", "width"), [(1, 150), (3, 300), (300, 3), (3, 3)])
def test_a_thin_clip_is_not_taken_for_one_with_its_channels_first(
    family: str, height: int, width: int, processors: dict[str, Any]
) -> None:
    processor, clip = processors[family], clip_of(8, height, width)
    ordinary = clip_of(8)
    for clips_of_batch in ([clip], [ordinary, clip], [clip, ordinary]):  # the first one decides for transformers
        found = pixel_values(process_media(processor, [], clips_of_batch))
        told = processor.video_processor(
            [torch.from_numpy(each.frames.transpose(0, 3, 1, 2)) for each in clips_of_batch],
            input_data_format="channels_first",
            do_sample_frames=False,
            return_tensors="pt",
        )
        assert torch.equal(found.view_as(pixel_values(told)), pixel_values(told))


def test_what_a_processor_refuses_names_the_sample(processors: dict[str, Any], tmp_path: Path) -> None:
    path = clips.write_clip(tmp_path / "a.mp4", clips.moving_frames(4))
    collator = ChatCollator(processors["qwen3_vl"], None, VideoReader(VideoConfig(frames=1), None))
    with pytest.raises(ProcessorError, match="sample 'x': Qwen3VLProcessor refuses its input: t:1 must be larger"):
        collator([sample("x", None, TURNS, path)])


# --- Times and lengths ---


@pytest.mark.parametrize("family", OF_CLIPS)
def test_clips_of_several_lengths_share_a_batch_or_are_refused_by_name(family: str, processors: dict[str, Any]) -> None:
    processor, questions = processors[family], [ask("what ?", clip_of(5)), ask("what ?", clip_of(8))]
    if family in OF_ONE_LENGTH:
        name = type(processor).__name__
        with pytest.raises(
            ProcessorError, match=f"clips of 5, 8 frames for one batch, where {name} .*video.fps to null"
        ):
            prepare_questions(processor, questions, torch.device("cpu"))
        questions = questions[:1] * 2
    inputs = prepare_questions(processor, questions, torch.device("cpu"))
    one_by_one = [prepare_questions(processor, [each], torch.device("cpu")) for each in questions]
    assert torch.equal(pixel_values(inputs), torch.cat([pixel_values(each) for each in one_by_one]))


def config(fps: float | None, batch: int, where: str) -> RunConfig:
    sizes = {"train": 1, "probe": 1, "evaluation": 1, where: batch}
    return RunConfig(
        run_dir="r",
        stream="s",
        model=ModelConfig(base_model="b"),
        video=VideoConfig(fps=fps),
        train=TrainConfig(per_device_train_batch_size=sizes["train"]),
        probe=ProbeConfig(batch_size=sizes["probe"]),
        evaluation=EvaluationConfig(batch_size=sizes["evaluation"]),
    )


@pytest.mark.parametrize("where", ["train", "probe", "evaluation"])
@pytest.mark.parametrize("family", OF_CLIPS)
def test_a_run_with_video_fps_is_refused_at_the_start_where_batches_would_fail(family: str, where: str) -> None:
    model_config = BUILDERS[family]()[0]
    for fps, batch in ((None, 8), (1.0, 1)):
        check_clip_lengths(config(fps, batch, where), model_config)
    if family in OF_ONE_LENGTH:
        with pytest.raises(ConfigError, match=f"video.fps is 2, .*{family} takes one number in a batch; set video.fps"):
            check_clip_lengths(config(2.0, 8, where), model_config)
    else:
        check_clip_lengths(config(2.0, 8, where), model_config)


def test_an_override_of_one_task_counts_too() -> None:
    settings = config(2.0, 1, "train")
    settings.train_overrides["birds"] = {"per_device_train_batch_size": 4}
    with pytest.raises(ConfigError, match="video.fps is 2"):
        check_clip_lengths(settings, BUILDERS["video_llava"]()[0])


def test_qwen_is_told_when_the_frames_of_a_clip_of_variable_rate_are_shown(
    tmp_path: Path, processors: dict[str, Any]
) -> None:
    times = [0.1 * i for i in range(20)] + [2.0 + 2.0 * i for i in range(6)]
    path = clips.write_timed_clip(tmp_path / "a.mp4", times)
    clip = VideoReader(VideoConfig(frames=6), None).read(path)
    right = [times[index] for index in clip.indices]
    assert right == pytest.approx([0.0, 2.0, 4.0, 6.0, 8.0, 12.0])  # on the screen at 0, 2.4, 4.8 ...

    qwen3 = processors["qwen3_vl"]
    written: list[str] = []
    inner = qwen3.tokenizer.__class__.__call__

    class Tokenizer(qwen3.tokenizer.__class__):  # type: ignore[name-defined, misc]
        def __call__(self, text: Any = None, *rest: Any, **settings: Any) -> Any:
            written.extend(text if isinstance(text, list) else [text])
            return inner(self, text, *rest, **settings)

    before, qwen3.tokenizer.__class__ = qwen3.tokenizer.__class__, Tokenizer
    try:
        prepare_questions(qwen3, [ask("what ?", clip)], torch.device("cpu"))
    finally:
        qwen3.tokenizer.__class__ = before
    pairs = [(first + second) / 2 for first, second in zip(right[::2], right[1::2], strict=True)]
    prompt = next(text for text in written if "seconds" in text)
    assert [f"<{pair:.1f} seconds>" in prompt for pair in pairs] == [True] * 3

    inputs = process_media(processors["qwen2_5_vl"], [], [clip], ["<|vision_start|><|video_pad|><|vision_end|> what ?"])
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2 * clip.duration / 6)
    assert clip.duration == pytest.approx(12.0 * 26 / 25)
