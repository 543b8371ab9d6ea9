"""Records that show clips: CL-VISTA's paired files, names without a suffix, and what is wrong with them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mllm_keeplora.config import VideoConfig
from mllm_keeplora.data.conversation import MediaFile
from mllm_keeplora.data.preflight import Preflight
from mllm_keeplora.data.records import RecordError, load_records, named_media
from mllm_keeplora.data.stream import Stream, TaskSpec, data_hash, load_training_records
from mllm_keeplora.data.video.reader import VideoReader
from tests.clips import write_clip
from tests.conversations import Turn, sample, shown_by, turns_of

FRAMES = 12


@pytest.fixture(scope="module")
def checker() -> Preflight:
    return Preflight(VideoReader(VideoConfig(frames=8), None))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with clips test/0.mp4, test/1.avi and train/0.mp4."""
    rng = np.random.default_rng(0)
    for name in ("test/0.mp4", "test/1.avi", "train/0.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_clip(tmp_path / name, list(rng.integers(0, 255, (FRAMES, 48, 64, 3), dtype=np.uint8)))
    return tmp_path


def write(root: Path, name: str, records: list[Any]) -> Path:
    (root / name).write_text(json.dumps(records))
    return root / name


def questions(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    base = [{"video_name": f"test/{n}", "question": f"<video>\nQ{n}?", "question_id": n} for n in (0, 1)]
    return [{**record, **change} for record, change in zip(base, changes or ({}, {}), strict=True)]


def pair(root: Path, records: list[Any], answers: tuple[str, ...] = ("left", "right")) -> dict[str, Any]:
    return {
        "path": write(root, "questions.json", records),
        "media_root": root,
        "answers": write(root, "answers.json", [{"answer": answer} for answer in answers]),
    }


def refusal(**arguments: Any) -> str:
    with pytest.raises(RecordError) as caught:
        load_records(**arguments)
    return str(caught.value)


def test_questions_get_the_answers_of_their_position(root: Path, checker: Preflight) -> None:
    samples, skipped = load_records(**pair(root, questions()), checker=checker)
    assert samples == [
        sample("0", None, (Turn("Q0?", "left"),), video=root / "test/0.mp4"),
        sample("1", None, (Turn("Q1?", "right"),), video=root / "test/1.avi"),
    ]
    assert skipped == []


def test_training_conversations_and_messages_name_clips(root: Path, checker: Preflight) -> None:
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "left"}]
    parts = [{"type": "video"}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "left"}]
    records = [
        {"id": "a", "video": "train/0.mp4", "conversations": turns},
        {"id": "b", "videos": ["train/0.mp4"], "messages": messages},
    ]
    samples, _ = load_records(write(root, "train.json", records), root, checker=checker)
    assert [shown_by(s) for s in samples] == [root / "train/0.mp4"] * 2
    assert {turns_of(s) for s in samples} == {(Turn("What?", "left"),)}
    assert {s.kinds for s in samples} == {frozenset(["video"])}


def test_questions_and_answers_of_different_numbers_are_refused(root: Path) -> None:
    message = refusal(**pair(root, questions(), answers=("left",)))
    assert "questions.json has 2 questions" in message
    assert "answers.json has 1 answers" in message


def test_a_question_id_used_twice_is_refused_with_both_rows(root: Path, checker: Preflight) -> None:
    message = refusal(**pair(root, questions({}, {"question_id": 0})), checker=checker)
    assert "row 2: question_id 0 is used in row 1 already" in message


def test_an_empty_answer_and_a_reply_without_one_are_refused(root: Path) -> None:
    assert "row 1: no answer: it is empty" in refusal(**pair(root, questions(), answers=("", "right")))
    arguments = pair(root, questions())
    arguments["answers"].write_text('[{"answer": "left"}, "right"]')
    assert "row 2: the answer is no JSON object" in refusal(**arguments)


def test_a_missing_clip_is_named_with_its_row(root: Path, checker: Preflight) -> None:
    message = refusal(**pair(root, questions({}, {"video_name": "test/7"})), checker=checker)
    assert "1 of 2 records cannot be used" in message
    assert f"row 2: {root / 'test/7'}" in message or f"row 2: video {root / 'test/7'}" in message


def test_a_clip_that_is_too_short_is_left_out_by_explicit_setting_alone(root: Path, checker: Preflight) -> None:
    write_clip(root / "test/1.avi", list(np.zeros((3, 48, 64, 3), dtype=np.uint8)))
    arguments = {**pair(root, questions()), "checker": checker}
    assert "row 2: " in refusal(**arguments)
    samples, skipped = load_records(**arguments, on_bad_record="skip")
    assert [sample.id for sample in samples] == ["0"]
    assert [(record.row, "3" in record.reason) for record in skipped] == [(2, True)]


def test_a_clip_outside_the_media_root_is_refused(root: Path) -> None:
    inside = root / "test"
    arguments = pair(root, questions({"video_name": "0"}, {"video_name": "../train/0"}))
    assert "row 2: video '../train/0' lies outside" in refusal(**{**arguments, "media_root": inside})


def test_named_media_are_found_under_their_suffix(root: Path) -> None:
    path = pair(root, questions())["path"]
    assert named_media(path, root) == {root / "test/0.mp4", root / "test/1.avi"}


def test_sound_files_are_remembered_until_one_changes(root: Path, tmp_path: Path) -> None:
    reader = VideoReader(VideoConfig(frames=8), None)
    checker = Preflight(reader, tmp_path / "memory")
    clips = [MediaFile("video", root / "test/0.mp4"), MediaFile("video", root / "train/0.mp4")]
    assert checker.media(clips, "x") == {}
    assert Preflight(None, tmp_path / "memory").media(clips, "x") != {}  # other sampling: none
    forgetful = Preflight(VideoReader(VideoConfig(frames=8, timeout=1e-6), None), tmp_path / "memory")
    assert forgetful.media(clips, "x") == {}  # nothing is decoded again
    clips[0].path.write_bytes(b"")
    assert set(checker.media(clips, "x")) == {clips[0].path}


def video_stream(root: Path) -> Stream:
    pair(root, questions())
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "left"}]
    write(root, "train.json", [{"id": "a", "video": "train/0.mp4", "conversations": turns}])
    task = TaskSpec("t", "train.json", "questions.json", "exact", test_answers="answers.json")
    return Stream("s", root, (task,))


def test_the_data_hash_covers_answers_and_clips(root: Path) -> None:
    stream = video_stream(root)
    [task] = stream.tasks
    hashes = [data_hash(stream, task)]
    write(root, "answers.json", [{"answer": "left"}, {"answer": "up"}])
    hashes.append(data_hash(stream, task))
    (root / "test/1.avi").write_bytes(b"other")
    hashes.append(data_hash(stream, task))
    assert len(set(hashes)) == 3


def test_every_clip_of_a_stream_is_decoded_before_the_first_stage(root: Path, checker: Preflight) -> None:
    stream = video_stream(root)
    assert len(load_training_records(stream, checker=checker)["t"][0]) == 1
    (root / "test/1.avi").write_bytes((root / "test/1.avi").read_bytes()[:100])
    with pytest.raises(RecordError, match="questions.json: 1 of 2"):
        load_training_records(stream, "skip", checker)
