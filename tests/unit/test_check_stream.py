"""The checker on a small stream: every planted fault is found, all in one pass, and sound data pass."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mllm_keeplora.commands.main import main
from mllm_keeplora.config import VideoConfig
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.stream import load_stream, load_training_records
from mllm_keeplora.data.video.reader import VideoReader
from mllm_keeplora.planning.check_stream import SHOWN, Report, check_stream, format_report
from tests.clips import cut, moving_frames, write_clip

Records = list[dict[str, Any]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two tasks, one of images and one of clips, and a general benchmark with an own file."""
    root = tmp_path / "data"
    (root / "birds").mkdir(parents=True)
    (root / "drives").mkdir()
    for n in range(6):
        Image.new("RGB", (8, 8), (40 * n, 0, 0)).save(root / "birds" / f"{n}.png")
        write_clip(root / "drives" / f"{n}.mp4", moving_frames(9, height=32, width=32, seed=n))
    dump(root / "birds" / "train.json", [shown(n, f"{n}.png") for n in range(4)])
    dump(root / "birds" / "test.json", [asked(n, f"{n + 4}.png") for n in range(2)])
    dump(root / "drives" / "train.json", [shown(n, f"{n}.mp4", "video") for n in range(4)])
    questions = [{"question_id": n, "video_name": f"{n + 4}", "question": "What?"} for n in range(2)]
    dump(root / "drives" / "questions.json", questions)
    dump(root / "drives" / "answers.json", [{"answer": "yes"}] * 2)
    return root


def shown(n: int, name: str, media: str = "image") -> dict[str, Any]:
    turns = [("human", f"<{media}>\nWhich is number {n}?"), ("gpt", "this")]
    return {"id": str(n), media: name, "conversations": [{"from": who, "value": text} for who, text in turns]}


def asked(n: int, name: str) -> dict[str, Any]:
    return {"question_id": n, "image": name, "text": "Which?", "answer": "that"}


def dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def change(path: Path, edit: Callable[[Records], object]) -> None:
    records = json.loads(path.read_text())
    edit(records)
    dump(path, records)


def write_stream(root: Path, **hub: object) -> Path:
    birds = {"train": "birds/train.json", "test": "birds/test.json", "media_root": "birds"}
    drives = {
        "train": "drives/train.json",
        "test": "drives/questions.json",
        "test_answers": "drives/answers.json",
        "media_root": "drives",
    }
    stream: dict[str, Any] = {
        "name": "s",
        "data_root": str(root),
        "tasks": [
            {"name": "birds", "metric": "exact", **birds},
            {"name": "drives", "metric": "exact", **drives},
        ],
        "general": [
            {"name": "watched", "metric": "exact", "test": "birds/test.json", "media_root": "birds"},
            {"name": "pope", "lmms_eval_task": "pope", "score": "pope_accuracy", "native_max": 1.0},
        ],
    }
    if hub:
        stream["hub"] = hub
    path = root.parent / "stream.yaml"
    path.write_text(yaml.safe_dump(stream))
    return path


def check(root: Path, memory: Path | None = None, **hub: object) -> Report:
    stream = load_stream(write_stream(root, **hub), check_files=False)
    return check_stream(stream, Preflight(VideoReader(VideoConfig(frames=8), None), memory))


def test_sound_data_pass_and_are_counted(root: Path) -> None:
    report = check(root)
    assert report.problems == report.advice == ()
    birds, drives, watched, together = report.counts
    assert (birds.name, birds.train, birds.test, birds.images, birds.clips) == ("birds", 4, 2, 6, 0)
    assert (drives.train, drives.test, drives.images, drives.clips) == (4, 2, 0, 6)
    assert drives.size == sum(path.stat().st_size for path in (root / "drives").glob("*.mp4"))
    assert (watched.train, watched.test) == (0, 2)
    assert (together.train, together.test, together.images) == (8, 6, 6)  # shared images count once
    assert "Nothing wrong found." in format_report(report)


def _truncate(path: Path) -> None:
    cut(path, path, 0.6)


FAULTS: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "a missing image": (
        lambda r: (r / "birds/1.png").unlink(),
        r"row 2: image .*1\.png does not exist",
        True,
    ),
    "a truncated image": (lambda r: _truncate(r / "birds/1.png"), r"row 2: image .* does not decode", True),
    "a missing clip": (lambda r: (r / "drives/1.mp4").unlink(), r"row 2: video .* does not exist", True),
    "a truncated clip": (lambda r: _truncate(r / "drives/5.mp4"), r"row 2: video .*5\.mp4", True),
    "an empty answer": (
        lambda r: change(r / "birds/test.json", lambda x: x[0].update(answer=" ")),
        "row 1: no answer",
        True,
    ),
    "an empty answer apart": (
        lambda r: change(r / "drives/answers.json", lambda x: x[1].update(answer="")),
        "row 2: no answer",
        True,
    ),
    "a wrong key": (
        lambda r: change(r / "birds/train.json", lambda x: x[2].update(conversation=x[2].pop("conversations"))),
        "row 3: no question: .*found 'id', 'image', 'conversation'",
        True,
    ),
    "a record without media": (
        lambda r: change(r / "birds/train.json", lambda x: x[0].pop("image")),
        "row 1: no image although",
        True,
    ),
    "fewer answers": (
        lambda r: change(r / "drives/answers.json", list.pop),
        "has 2 questions, .*has 1 answers",
        True,
    ),
    "a duplicate id": (
        lambda r: change(r / "birds/test.json", lambda x: x[1].update(question_id=0)),
        "1 records have the id of an earlier one.*row 2 repeats row 1",
        False,
    ),
    "a duplicate id apart": (
        lambda r: change(r / "drives/questions.json", lambda x: x[1].update(question_id=0)),
        "row 2: question_id 0 is used in row 1 already",
        True,
    ),
    "an identical record": (
        lambda r: change(r / "birds/train.json", lambda x: x.append({**x[0], "id": "new"})),
        "1 records are identical with an earlier one.*row 5 repeats row 1",
        False,
    ),
    "an overlap": (
        lambda r: change(r / "birds/test.json", lambda x: x[1].update(image="3.png", text="Which is number 3?")),
        "1 questions are in the training file too.*row 2 of the test is row 4 of the training",
        False,
    ),
    "a missing file": (lambda r: (r / "birds/train.json").unlink(), "1 of the files .*train.json", True),
    "a missing file of answers": (lambda r: (r / "drives/answers.json").unlink(), "answers.json", True),
    "no JSON": (lambda r: (r / "birds/test.json").write_text("[{]"), "test.json, row 1: not valid JSON", True),
    "no records": (lambda r: (r / "birds/train.json").write_text("[]"), "train.json holds no records", True),
}


@pytest.mark.parametrize("plant, message, stops", FAULTS.values(), ids=FAULTS)
def test_each_fault_is_found(root: Path, plant: Callable[[Path], object], message: str, stops: bool) -> None:
    plant(root)
    problems = [p for p in check(root).problems if p.task != "watched"]
    assert len(problems) == 1, problems
    text = "\n".join((problems[0].title, *problems[0].details))
    assert re.search(message, text, flags=re.DOTALL), text
    assert problems[0].stops == stops


def test_all_faults_are_found_in_one_pass(root: Path) -> None:
    (root / "birds/1.png").unlink()
    change(root / "birds/test.json", lambda x: x[0].update(answer=" "))
    change(root / "drives/answers.json", list.pop)
    _truncate(root / "drives/5.mp4")
    change(root / "drives/train.json", lambda x: x[1].update(id="0"))
    text = format_report(check(root))
    for part in ("1.png does not exist", "no answer", "has 1 answers", "5.mp4", "row 2 repeats row 1"):
        assert part in text, part
    assert "stop a run (!)" in text


@pytest.mark.parametrize("answers", [None, '[{"answer": "yes"}]'])
def test_clips_are_checked_without_their_answers_too(root: Path, answers: str | None) -> None:
    _truncate(root / "drives/5.mp4")
    (root / "drives/answers.json").unlink()
    if answers is not None:
        (root / "drives/answers.json").write_text(answers)
    first, second = check(root).problems
    assert "answers" in "".join((first.title, *first.details))
    assert "1 of its clips are bad" in second.title


def test_long_lists_are_cut_with_a_count(root: Path) -> None:
    change(root / "birds/train.json", lambda x: x.extend(shown(n, f"gone{n}.png") for n in range(4, 24)))
    report = check(root)
    assert len(report.problems[0].details) == 20
    text = format_report(report)
    assert text.count("does not exist") == SHOWN
    assert "... and 10 more (--all shows every one)" in text
    assert format_report(report, None).count("does not exist") == 20


def test_a_metric_that_cannot_score_the_records_is_found(root: Path) -> None:
    path = write_stream(root)
    stream = yaml.safe_load(path.read_text())
    stream["tasks"][0]["metric"] = "nonsense"
    stream["tasks"][1]["metric"] = "acl_ocr"
    path.write_text(yaml.safe_dump(stream))
    checker = Preflight(VideoReader(VideoConfig(frames=8), None))
    problems = check_stream(load_stream(path, check_files=False), checker).problems
    assert ["no metric 'nonsense'" in p.title or "answer_type" in p.title for p in problems] == [True, True]


def test_what_is_missing_is_looked_for_where_it_is_published(root: Path) -> None:
    for path in [*root.glob("drives/*.mp4"), root / "birds/train.json"]:
        path.unlink()
    report = check(root, repo_id="somebody/birds", elsewhere={"drives": "the drivers"})
    assert [line.split(" files")[0] for line in report.advice] == ["6", "1"]
    assert "get them from the drivers" in report.advice[0]
    assert "huggingface.co/datasets/somebody/birds" in report.advice[1]
    assert "keeplora fetch" in report.advice[1]


def test_a_run_need_not_decode_again_what_was_found_sound(root: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    check(root, memory)
    assert len(list(memory.iterdir())) == 2  # one writing of images, one of clips
    reader = VideoReader(VideoConfig(frames=8, timeout=1e-6), None)  # would fail on every clip
    load_training_records(load_stream(write_stream(root)), checker=Preflight(reader, memory))


def test_decoded_clips_are_set_against_the_cache(root: Path) -> None:
    stream = load_stream(write_stream(root))
    for gigabytes, verdict in ((1.0, "all fit"), (5e-5, "of them fit")):
        reader = VideoReader(VideoConfig(frames=8, cache_gb=gigabytes), None)
        _, note = check_stream(stream, Preflight(reader)).notes
        assert verdict in note
        assert "147 kB" in note  # 6 clips of 8 frames of 32 x 32 pixels in 3 bytes


@pytest.mark.parametrize("spelling", ["data_root={}", "--data_root={}", "--data_root {}"])
def test_the_command_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spelling: str) -> None:
    path = write_stream(root)
    arguments = [str(path), *spelling.format(root).split(), f"cache_dir={tmp_path / 'cache'}"]
    assert main(["check", *arguments]) == 0
    (root / "birds" / "0.png").unlink()
    assert main(["check", *arguments]) == 1
    assert "0.png does not exist" in capsys.readouterr().out
    change(root / "birds/train.json", lambda x: x.extend(shown(n, f"gone{n}.png") for n in range(4, 24)))
    assert main(["check", *arguments, "--all"]) == 1
    assert capsys.readouterr().out.count("/gone") == 20


SMALL = "recipes/small/vqa_base"


def test_records_go_through_the_model_that_is_named(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(write_stream(root)), f"--data_root={root}", f"--cache_dir={tmp_path / 'cache'}"]
    assert main(["check", *arguments]) == 0
    assert "Note: no base model is named" in capsys.readouterr().out
    assert main(["check", *arguments, f"--base_model={SMALL}"]) == 1  # it takes no clips
    said = capsys.readouterr().out
    assert "birds trains on\n  4 samples of " in said
    assert re.search(r"longest \(no limit\): \d+ tokens in row 1 \(id 0\)", said)
    assert re.search(r"train.json: 4 of 4 records cannot be used\n +row 1: .*takes no video", said)
    assert re.search(r"questions.json: 2 of 2 records cannot be used\n +row 1: .*takes no video", said)


@pytest.mark.parametrize("spelling", ["--config={}", "--config {}"])
def test_the_settings_of_a_run_are_those_of_its_check(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spelling: str
) -> None:
    stream = yaml.safe_load(write_stream(root).read_text())
    stream["tasks"].pop()
    (tmp_path / "images.yaml").write_text(yaml.safe_dump(stream))
    settings = {"stream": str(tmp_path / "images.yaml"), "cache_dir": str(tmp_path / "cache")}
    run = {**settings, "model": {"base_model": SMALL}, "train": {"max_length": 64}}
    for overrides, status in (({}, 0), ({"birds": {"max_length": 9}}, 1)):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({**run, "train_overrides": overrides}))
        assert main(["check", *spelling.format(tmp_path / "run.yaml").split()]) == status
    assert re.search(r"row 1: .* tokens, media tokens included; max_length is 9", capsys.readouterr().out)


def test_tokens_are_counted_with_the_suffix_of_the_task(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stream = yaml.safe_load(write_stream(root).read_text())
    stream["tasks"].pop()
    longest = []
    for name, suffix in (("without", ""), ("with", " Answer with one word.")):
        stream["tasks"][0]["prompt_suffix"] = suffix
        (tmp_path / "images.yaml").write_text(yaml.safe_dump(stream))
        arguments = [str(tmp_path / "images.yaml"), f"--cache_dir={tmp_path / name}", f"--base_model={SMALL}"]
        assert main(["check", *arguments]) == 0
        found = re.search(r"longest \(no limit\): (\d+) tokens", capsys.readouterr().out)
        assert found is not None
        longest.append(int(found[1]))
    assert longest[1] > longest[0]


@pytest.mark.parametrize("argument", ["dat_root=x", "video.frames=many", "video.frames=0"])
def test_a_bad_argument_is_refused(root: Path, capsys: pytest.CaptureFixture[str], argument: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", str(write_stream(root)), argument])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
