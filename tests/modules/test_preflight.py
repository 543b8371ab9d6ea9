"""The check before a run: it counts what the collator counts, refuses what it refuses, and remembers both."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mllm_keeplora  # noqa: F401  # prepares the environment for transformers
import mllm_keeplora.data.preflight as module
from mllm_keeplora.config import VideoConfig
from mllm_keeplora.data.chat_template import ProcessorError, chat_form, render
from mllm_keeplora.data.collator import ChatCollator, process_media
from mllm_keeplora.data.conversation import MediaFile, Message, Sample
from mllm_keeplora.data.preflight import Findings, Length, Preflight
from mllm_keeplora.data.records import RecordError
from mllm_keeplora.data.stream import Stream, TaskSpec, load_training_records
from mllm_keeplora.data.video.reader import Clip
from mllm_keeplora.modeling.loss import IGNORED_LABEL
from tests.conversations import Turn, sample
from tests.modules.tiny_families import BUILDERS, WRITING

SIZES = [(80, 72), (64, 3), (200, 100), (30, 140), (80, 72)]
IN_WORKERS = module._in_workers
VIDEO_FAMILIES = ["llava_onevision", "video_llava", "llava_next_video", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl"]


class DrawnClips:
    """Reads a clip whose height, width and frames are the name of its file."""

    config = VideoConfig()

    def read(self, path: Path) -> Clip:
        height, width, frames = map(int, path.stem.split("-"))
        pixels = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        return Clip(pixels, tuple(range(0, 3 * frames, 3)), 12.5, 3 * frames)


def processor_of(family: str) -> Any:
    return BUILDERS[family]()[1]


def picture(folder: Path, width: int, height: int) -> MediaFile:
    path = folder / f"{width}x{height}.png"
    Image.effect_noise((width, height), 60).convert("RGB").save(path)
    return MediaFile("image", path)


def asks(*parts: Any, answer: str = "red", supervised: bool = True) -> Sample:
    return Sample("s", (Message("user", tuple(parts)), Message("assistant", (answer,), supervised)))


def numbered(*samples: Sample) -> dict[int, Sample]:
    return dict(enumerate(samples, start=1))


def collated(processor: Any, samples: dict[int, Sample]) -> dict[int, Length]:
    found = {}
    for row, one in samples.items():
        batch = ChatCollator(processor, reader=DrawnClips())([one])  # type: ignore[arg-type]
        found[row] = Length(batch["input_ids"].shape[1], int((batch["labels"] != IGNORED_LABEL).sum()))
    return found


@pytest.fixture
def samples(tmp_path: Path) -> dict[int, Sample]:
    """Pictures of several shapes, a repeated size, two turns, two pictures in one question, and text alone."""
    shown = [picture(tmp_path, *size) for size in SIZES]
    turns = (Turn("what is this ?", "red"), Turn("is this blue ?", "yes blue no"))
    return numbered(
        *(sample(str(n), file.path, turns[: 1 + n % 2]) for n, file in enumerate(shown)),
        asks(shown[0], "left or right ?", shown[2], answer="left"),
        asks("what is red ?"),
    )


@pytest.mark.parametrize("family", WRITING)
def test_it_counts_what_the_collator_counts(family: str, samples: dict[int, Sample]) -> None:
    processor = processor_of(family)
    if family in VIDEO_FAMILIES:
        for name in ("48-64-8", "64-48-8", "48-64-8", "48-64-4"):
            samples[len(samples) + 1] = asks(MediaFile("video", Path(f"{name}.mp4")), "what is this ?")
    found = Preflight(DrawnClips(), None, processor).records(samples, "x", "t")  # type: ignore[arg-type]
    assert found == Findings({}, collated(processor, samples))
    assert len(set(found.lengths.values())) > 3


@pytest.mark.parametrize("family", ["gemma3", "internvl", "qwen3_vl"])
def test_what_a_processor_writes_beside_media_may_make_one_token_with_the_text_there(
    family: str, tmp_path: Path
) -> None:
    processor = processor_of(family)
    processor.tokenizer.add_tokens(["\n\n", "\n\n\n", "\n\n\n\n", "?<"])  # as true vocabularies have them
    shown = [picture(tmp_path, 80, 72), picture(tmp_path, 80, 72)]
    if family != "gemma3":
        shown = [MediaFile("video", Path("48-64-8.mp4")), MediaFile("video", Path("48-64-8.mp4"))]
    first, second = shown
    between = ["left", "left ?", "left\n", "left :\n\n", "?", "red?", "\nblue?\n"]
    samples = numbered(*(asks(first, text, second, "what is this ?") for text in between))
    found = Preflight(DrawnClips(), None, processor).records(samples, "x", "t")  # type: ignore[arg-type]
    assert found == Findings({}, collated(processor, samples))


def test_each_file_is_decoded_once_and_each_size_processed_once(
    samples: dict[int, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, processed = [], []
    decode, processor = module.load_image, processor_of("qwen2_5_vl")
    call = type(processor).__call__
    monkeypatch.setattr(module, "load_image", lambda path: decoded.append(path) or decode(path))
    monkeypatch.setattr(
        type(processor), "__call__", lambda self, *a, **k: processed.append(k["text"]) or call(self, *a, **k)
    )
    Preflight(None, None, processor).records(samples, "x", "t")
    assert len(decoded) == len(set(decoded)) == len(set(SIZES))
    assert len(processed) == len(set(SIZES)) + 2  # two pictures together, and none


def test_worker_processes_find_the_same_and_leave_the_generator_alone(
    samples: dict[int, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples[20] = asks(MediaFile("image", Path("gone.png")), "what ?")
    alone = Preflight(None, None, processor_of("llava_next")).records(samples, "x", "t")
    monkeypatch.setattr(module, "_ALONE_SECONDS", 0.0)
    monkeypatch.setattr(module, "_SHARES", dict.fromkeys(module._SHARES, 1))
    monkeypatch.setattr(module, "_cores", lambda: 2)
    started, by_workers = [], module._by_workers
    monkeypatch.setattr(module, "_by_workers", lambda *a: started.append(len(a[1])) or by_workers(*a))
    before = torch.get_rng_state()
    assert Preflight(None, None, processor_of("llava_next")).records(samples, "x", "t") == alone
    assert len(started) == 2  # pictures, then records
    assert torch.equal(torch.get_rng_state(), before)
    assert set(alone.bad) == {20}


LONG = "what is this ? " * 30
REFUSED: dict[str, tuple[str, Any, str]] = {
    "too long": ("llava", lambda f: asks(picture(f, 64, 64), LONG), "has 1[0-9][0-9] tokens.*max_length is 90"),
    "too long for its tiles": ("llava_next", lambda f: asks(picture(f, 640, 640), "what ?"), "max_length is 90"),
    "narrow": ("qwen2_5_vl", lambda f: asks(picture(f, 300, 1), "what ?"), "200 times the other"),
    "high": ("qwen3_vl", lambda f: asks(picture(f, 1, 300), "what ?"), "200 times the other"),
    "narrow clip": ("qwen2_5_vl", lambda f: asks(MediaFile("video", f / "2-420-4.mp4"), "what ?"), "aspect ratio"),
    "a clip for images": ("llava", lambda f: asks(MediaFile("video", f / "8-8-8.mp4"), "what ?"), "takes no video"),
    "media token": ("llava", lambda f: asks(picture(f, 64, 64), "what is <image> ?"), "'<image>'.* a control token"),
    "other token": (
        "qwen2_5_vl",
        lambda f: asks(picture(f, 64, 64), "a <|video_pad|> ?"),
        "video_pad.* a control token",
    ),
    "missing file": ("llava", lambda f: asks(MediaFile("image", f / "gone.png"), "what ?"), "does not exist"),
}
REFUSED_IN_TRAINING: dict[str, tuple[str, Any, str]] = {
    "token in an answer": (
        "llava",
        lambda f: asks(picture(f, 9, 9), "what ?", answer="<image>"),
        "'<image>'.* a control token",
    ),
    "nothing to learn": ("llava", lambda f: asks(picture(f, 9, 9), "what ?", supervised=False), "supervised"),
    "text alone": ("llava", lambda f: asks("what is this ?"), "language.adapt"),
}


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_IN_TRAINING])
@pytest.mark.parametrize("task", ["t", None], ids=["training", "test"])
def test_what_a_run_refuses_is_refused_with_its_row(name: str, task: str | None, tmp_path: Path) -> None:
    family, build, message = {**REFUSED, **REFUSED_IN_TRAINING}[name]
    good = asks(picture(tmp_path, 32, 32), "what is this ?")
    check = Preflight(DrawnClips(), None, processor_of(family), {"t": 90}, text_trains=False)  # type: ignore[arg-type]
    found = check.records(numbered(good, build(tmp_path)), "x", task)
    if task is None and (name.startswith("too long") or name in REFUSED_IN_TRAINING):
        assert found.bad == {}  # what the model is not given, or not taught, does no harm
    else:
        assert set(found.bad) == {2}
        assert re.search(message, found.bad[2]), found.bad[2]
    assert 1 in found.lengths


@pytest.mark.parametrize("height", [1, 3])
@pytest.mark.parametrize("family", ["llava_onevision", "video_llava", "llava_next_video"])
def test_a_low_picture_is_not_taken_for_one_with_channels_first(family: str, height: int) -> None:
    """A red one stays red; read as channels first, its columns become rows and its colours columns."""
    processor = processor_of(family)
    red = np.zeros((height, 64, 3), np.uint8)
    red[..., 0] = 255
    clip = Clip(np.stack([red] * 4), (0, 1, 2, 3), 8.0, 4)
    images = process_media(processor, [[Image.fromarray(red)]], [], [processor.image_token])
    videos = process_media(processor, [], [clip], [processor.video_token])
    [image] = [torch.as_tensor(v) for k, v in images.items() if k.startswith("pixel_values")]
    [video] = [torch.as_tensor(v) for k, v in videos.items() if k.startswith("pixel_values")]
    for pixels in (image, video):
        reds, greens = pixels.unbind(-3)[:2]
        assert float(reds.mean()) > float(greens.mean()) + 0.1


@pytest.mark.parametrize("raised", ["raise_exception('Roles must alternate')", "messages[7]['role']", "1 // 0"])
def test_what_a_template_raises_is_a_reason(raised: str, tmp_path: Path) -> None:
    processor = processor_of("llava")
    condition = "{% if messages | length > 2 %}{{ " + raised + " }}{% endif %}"
    processor.chat_template = condition + processor.chat_template
    path = picture(tmp_path, 32, 32).path
    one = (Turn("what ?", "red"),)
    rows = numbered(sample("a", path, one), sample("b", path, one * 2))
    found = Preflight(None, None, processor).records(rows, "x", "t")
    assert (set(found.lengths), set(found.bad)) == ({1}, {2})
    assert "chat template cannot render" in found.bad[2]


# --- in a stream ---


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    """One task; the second of its training records is narrow, as is the only picture of its test file."""
    for size in ((40, 40), (300, 1), (1, 300)):
        picture(tmp_path, *size)
    record = {"conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "red"}]}
    (tmp_path / "train.json").write_text(json.dumps([{**record, "image": f"{n}.png"} for n in ("40x40", "300x1")]))
    (tmp_path / "test.json").write_text(json.dumps([{**record, "image": "40x40.png"}]))
    return Stream("s", tmp_path, (TaskSpec(name="t", train="train.json", test="test.json", metric="exact"),))


def test_bad_training_records_are_named_or_left_out(stream: Stream) -> None:
    check = Preflight(None, None, processor_of("qwen2_5_vl"), {"t": None})
    with pytest.raises(RecordError, match=r"train\.json: 1 of 2 .*\n  row 2: .*200 times the other"):
        load_training_records(stream, "error", check)
    samples, skipped = load_training_records(stream, "skip", check)["t"]
    assert [one.id for one in samples] == ["train.json:1"]
    assert [(record.row, "200 times" in record.reason) for record in skipped] == [(2, True)]
    first, second = check.trained["t"]
    assert first.startswith("1 samples of ")
    assert "tokens in row 1 (id train.json:1)" in second


def test_a_bad_test_record_is_always_refused(stream: Stream, tmp_path: Path) -> None:
    text = (tmp_path / "test.json").read_text().replace("40x40", "1x300")
    (tmp_path / "test.json").write_text(text)
    with pytest.raises(RecordError, match=r"test\.json: 1 of 1 .*\n  row 1: .*200 times the other"):
        load_training_records(stream, "skip", Preflight(None, None, processor_of("qwen2_5_vl")))


@pytest.mark.parametrize("context", ["media of a later question", "an answer that is not learnt", "none"])
def test_of_a_test_records_answers_those_are_checked_that_the_model_is_given(context: str, tmp_path: Path) -> None:
    shown = [picture(tmp_path, 80, 72), picture(tmp_path, 64, 64)]
    later = (shown[1], "and this ?") if context == "media of a later question" else ("and this ?",)
    learnt = context != "an answer that is not learnt"
    record = Sample(
        "s",
        (
            Message("user", (shown[0], "what is this ?")),
            Message("assistant", ("red </s> blue",), learnt),
            Message("user", later),
            Message("assistant", ("left </s> right",)),
        ),
    )
    processor = processor_of("llava")
    refused = False
    for prompt, _ in record.questions:
        try:
            render(processor, prompt, chat_form(processor))
        except ProcessorError:
            refused = True
    found = Preflight(None, None, processor).records(numbered(record), "x", None)
    assert refused == (context != "none") == ("'red </s> blue' contains '</s>'" in found.bad.get(1, ""))


# --- what is remembered ---


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(compute: Any, items: list[Any], *_: Any) -> Any:
        assert items == [], "computed again"
        return iter(())

    monkeypatch.setattr(module, "_in_workers", fail)


def test_what_was_sound_is_remembered(
    samples: dict[int, Sample], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    found = Preflight(None, tmp_path / "memory", processor_of("llava")).records(samples, "x", "t")
    request.getfixturevalue("no_work")
    assert Preflight(None, tmp_path / "memory", processor_of("llava")).records(samples, "x", "t") == found
    shorter = Preflight(None, tmp_path / "memory", processor_of("llava"), {"t": 20}).records(samples, "x", "t")
    assert set(shorter.bad) == {row for row, length in found.lengths.items() if length.tokens > 20}


CHANGES = {
    "the text": lambda check, rows: (check, {**rows, 7: asks("what is blue ?")}),
    "the picture": lambda check, rows: (check, {**rows, 2: asks(picture(rows[2].media[0].path.parent, 64, 4), "?")}),
    "the processor": lambda check, rows: (replace(check, processor=processor_of("llava_next")), rows),
    "supervision": lambda check, rows: (check, {**rows, 7: asks("what is red ?", supervised=False)}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_checked_again(change: Any, samples: dict[int, Sample], tmp_path: Path, no_work: None) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "_in_workers", IN_WORKERS)
        check = Preflight(None, tmp_path / "memory", processor_of("llava"))
        check.records(samples, "x", "t")
    again, rows = change(replace(check), samples)
    with pytest.raises(AssertionError, match="computed again"):
        again.records(rows, "x", "t")


@pytest.mark.parametrize("change", [{"backend": "decord"}, {"frames": 4}, {"fps": 2.0}, {}], ids=str)
def test_a_clip_is_decoded_again_where_other_settings_may_refuse_it(change: dict[str, Any], tmp_path: Path) -> None:
    file = MediaFile("video", tmp_path / "48-64-8.mp4")
    file.path.touch()
    reads = []
    for settings in ({}, change):
        reader = DrawnClips()
        reader.config = VideoConfig(**settings)
        reader.read = lambda path: reads.append(path) or DrawnClips().read(path)  # type: ignore[method-assign,func-returns-value]
        Preflight(reader, tmp_path / "memory").media([file], "x")  # type: ignore[arg-type]
    assert len(reads) == (2 if change else 1)


def test_a_template_of_the_settings_is_part_of_the_processor(samples: dict[int, Sample], tmp_path: Path) -> None:
    processor = processor_of("llava")
    before = Preflight(None, tmp_path / "memory", processor).records(samples, "x", "t")
    processor.chat_template = processor.chat_template.replace("USER: ", "USER: USER: ")
    after = Preflight(None, tmp_path / "memory", processor).records(samples, "x", "t")
    assert {row: length.tokens for row, length in after.lengths.items()} != {
        row: length.tokens for row, length in before.lengths.items()
    }


def test_an_interrupted_check_goes_on_where_it_stopped(
    samples: dict[int, Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(compute: Any, items: list[Any], *rest: Any) -> Any:
        yield from list(IN_WORKERS(compute, items, *rest))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_in_workers", stopped)
    with pytest.raises(KeyboardInterrupt):
        Preflight(None, tmp_path / "memory", processor_of("llava")).records(samples, "x", "t")
    done = []

    def counted(compute: Any, items: list[Any], *rest: Any) -> Any:
        done.append(len(items))
        return IN_WORKERS(compute, items, *rest)

    monkeypatch.setattr(module, "_in_workers", counted)
    found = Preflight(None, tmp_path / "memory", processor_of("llava")).records(samples, "x", "t")
    assert done[0] == len(set(SIZES)) - 2
    assert found.lengths == collated(processor_of("llava"), samples)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_killed_check_leaves_what_it_wrote_on_the_way(
    samples: dict[int, Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def watched(*arguments: Any) -> Any:
        for outcome in IN_WORKERS(*arguments):
            yield outcome
            written.append(len(list((tmp_path / "memory").glob("*.json"))))

    monkeypatch.setattr(module, "_in_workers", watched)
    monkeypatch.setattr(module, "_WRITE_SECONDS", 0.0)
    Preflight(None, tmp_path / "memory", processor_of("llava")).records(samples, "x", "t")
    # The first and the fifth record are alike: same words, same size.
    assert written == list(range(1, len(set(SIZES)) + len(samples)))


@pytest.mark.parametrize("damage", [lambda t: t.replace("33", "34"), lambda t: t[:-9], lambda t: "[]"])
def test_a_damaged_memory_is_not_believed(damage: Any, samples: dict[int, Sample], tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    found = Preflight(None, memory, processor_of("llava")).records(samples, "x", "t")
    for file in memory.glob("*.json"):
        file.write_text(damage(file.read_text()))
    assert Preflight(None, memory, processor_of("llava")).records(samples, "x", "t") == found
