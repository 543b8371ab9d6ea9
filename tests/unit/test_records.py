"""Records: what is read, what is refused and in which words, even selection."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageFile

from mllm_keeplora.data.images import load_image
from mllm_keeplora.data.records import (
    RecordError,
    clean_question,
    load_records,
    named_media,
    read_records,
    select_evenly,
    suffix_for,
)
from tests.conversations import Turn, sample, shown_by, turns_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with one good image, images/a.png, inside a folder that holds other things."""
    root = tmp_path / "data"
    (root / "images").mkdir(parents=True)
    Image.new("L", (40, 30), 90).save(root / "images/a.png")
    return root


def train_record(**changes: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a bird"}]
    return {"id": "x1", "image": "images/a.png", "conversations": turns, **changes}


def question_record(**changes: Any) -> dict[str, Any]:
    return {"question_id": 7, "image": "images/a.png", "text": "What is it?", "answer": "a bird", **changes}


def message_record(question: Any = "What is it?", answer: Any = "a bird", **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": ["images/a.png"], **changes}


def write(root: Path, *records: Any, name: str = "records.json") -> Path:
    path = root / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(list(records)))
    return path


def refusal(root: Path, *records: Any, **settings: Any) -> str:
    """The message of the error that the records lead to."""
    with pytest.raises(RecordError) as caught:
        load_records(write(root, *records), root, **settings)
    return str(caught.value)


PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]


@pytest.mark.parametrize(
    ("name", "record", "sample_id"),
    [
        ("train.json", train_record(), "x1"),
        ("test.json", question_record(), "7"),
        ("test.jsonl", question_record(), "7"),
        ("plain.jsonl", message_record(), "plain.jsonl:1"),
        ("parts.jsonl", message_record(PARTS, [{"type": "text", "text": "a bird"}]), "parts.jsonl:1"),
        ("placeholder.jsonl", message_record("<image>What is it?"), "placeholder.jsonl:1"),
        ("one_image.jsonl", message_record(images=None, image="images/a.png"), "one_image.jsonl:1"),
    ],
)
def test_every_form_of_a_record_gives_the_same_sample(root: Path, name: str, record: Any, sample_id: str) -> None:
    if record.get("images", 0) is None:
        del record["images"]
    samples, skipped = load_records(write(root, record, name=name), root, prompt_suffix=" One word.")
    turn = Turn(question="What is it? One word.", answer="a bird")
    assert samples == [sample(sample_id, root / "images/a.png", (turn,))]
    assert skipped == []


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", "<image> What?", "  What? ", "What?"])
def test_the_placeholder_never_reaches_a_question(root: Path, question: str) -> None:
    record = train_record(conversations=[{"from": "human", "value": question}, {"from": "gpt", "value": " yes\n"}])
    [one], _ = load_records(write(root, record), root)
    assert turns_of(one) == (Turn("What?", "yes"),)
    assert clean_question(question) == "What?"


def test_several_turns_keep_their_order_and_each_get_the_suffix(root: Path) -> None:
    turns = train_record()["conversations"]
    record = train_record(conversations=turns + [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "wings"}])
    [one], _ = load_records(write(root, record), root, prompt_suffix=" Go.")
    assert turns_of(one) == (Turn("What is it? Go.", "a bird"), Turn("Why? Go.", "wings"))


def test_the_first_of_several_accepted_answers_stands_for_them(root: Path) -> None:
    records = [question_record(answer=["open", "OPEN"]), question_record(answer_bbox="[0, 0, 1, 1]")]
    del records[1]["answer"]
    samples, _ = load_records(write(root, *records), root)
    assert [turns_of(s)[0].answer for s in samples] == ["open", "[0, 0, 1, 1]"]
    assert "no answer" in refusal(root, question_record(answer=[]))


def test_a_suffix_may_depend_on_the_reference_answer() -> None:
    rule = {"Yes": " Yes or no?", "*": " Which letter?"}
    assert [suffix_for(rule, answer) for answer in ("Yes", "yes", "A", None)] == [
        " Yes or no?",
        *[" Which letter?"] * 3,
    ]
    assert suffix_for(" One word.", "Yes") == " One word."


def test_records_are_read_with_their_rows_and_without_opening_media(root: Path) -> None:
    records = [question_record(answer=""), question_record(image="images/none.png")]
    samples, bad = read_records(write(root, *records), root)
    assert [*samples] == [2]
    assert bad == {1: "no answer: it is empty"}


def test_text_only_records_only_where_allowed(root: Path) -> None:
    record = question_record()
    del record["image"]
    assert "no image or video; text-only records need 'allow_text_only: true'" in refusal(root, record)
    samples, _ = load_records(write(root, record, question_record(image=None)), root, allow_text_only=True)
    assert [shown_by(s) for s in samples] == [None, None]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (train_record(image=None), "no image"),
        (train_record(image=""), "image path is ''"),
        (
            train_record(image=["images/a.png", "images/a.png"]),
            "2 images are named, but its questions have 1 times <image>",
        ),
        (message_record(images=[{"bytes": "AA"}]), "the image is a JSON object; expected the path of a file"),
        (train_record(conversations=[]), "no question"),
        ({"id": 1, "image": "images/a.png"}, "no question: none of 'conversations'"),
        (question_record(text=" "), "no question ('text'): it is empty"),
        (question_record(text="<image>\n"), "no question ('text'): it is empty"),
        (
            {key: value for key, value in question_record(anwser="a").items() if key != "answer"},
            "no answer: none of 'answer', ",
        ),
        (question_record(answer=""), "no answer: it is empty"),
        (question_record(answer=7), "the answer is 7, a JSON number; expected text in quotes"),
        (
            train_record(conversations=train_record()["conversations"][:1]),
            "no answer: 'conversations' ends with",
        ),
        (
            train_record(conversations=train_record()["conversations"][::-1]),
            "conversations[0] is the assistant's; expected the user's",
        ),
        (train_record(conversations=[{"from": "system", "value": "Be brief."}]), "no answer: 'conversations' ends"),
        (train_record(conversations=["What?"]), "conversations[0] is a JSON string without a role"),
        (message_record([{"type": "audio"}]), "has a part {'type': 'audio'}"),
        (train_record(video="a.mp4"), "1 videos are named, but its questions have 0 times <video>"),
        (train_record(image=None, video=3), "the video is a JSON number; expected the path of a file"),
        (question_record(text="<video>\nWhat?"), "no video although the question has <video>"),
        (question_record(text="<image> and <image>?"), "1 images are named, but its questions have 2 times <image>"),
        ("a string", "the record is a JSON string; expected an object"),
        (None, "the record is a JSON null; expected an object"),
    ],
)
def test_a_bad_record_is_refused_with_file_row_and_reason(root: Path, record: Any, reason: str) -> None:
    message = refusal(root, question_record(), record)
    assert "records.json: 1 of 2 records cannot be used" in message
    assert "  row 2: " in message
    assert reason in message
    assert "on_bad_record: skip" in message


def test_a_placeholder_without_an_image_is_refused_even_where_text_only_is_allowed(root: Path) -> None:
    message = refusal(root, train_record(image=None), allow_text_only=True)
    assert "no image although the question has <image>" in message


def damage(path: Path) -> None:
    """Cuts a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def make_noise(path: Path) -> None:
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("tolerant", [False, True], ids=["pillow default", "as lmms-eval leaves it"])
def test_a_truncated_image_is_refused(root: Path, suffix: str, tolerant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path = root / f"images/cut{suffix}"
    make_noise(path)
    record = question_record(image=f"images/cut{suffix}")
    load_records(write(root, record), root)
    damage(path)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    message = refusal(root, record)
    assert f"row 1: image {path} does not decode" in message
    assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant  # lmms-eval's own setting is left alone


def test_missing_empty_and_foreign_files_are_refused_as_images(root: Path) -> None:
    (root / "images/empty.png").touch()
    (root / "images/text.png").write_text("not an image")
    names = ["images/none.png", "images/empty.png", "images/text.png", "images"]
    message = refusal(root, *(question_record(image=name) for name in names))
    assert "4 of 4 records" in message
    for row, what in enumerate(
        ["none.png does not exist", "empty.png is empty (0 bytes)", "text.png is a text that begins"], 1
    ):
        assert f"row {row}: image" in message
        assert what in message
    assert "row 4: image" in message
    assert "on_bad_record" not in message  # nothing would be left


def test_image_paths_stay_in_the_media_root(root: Path) -> None:
    outside = root.parent / "secret.png"
    Image.new("RGB", (4, 4)).save(outside)
    (root / "images/link.png").symlink_to(outside)
    for name in ("../secret.png", "images/../../secret.png", str(outside), "images/link.png", "/etc/passwd"):
        message = refusal(root, question_record(image=name))
        assert f"image {name!r} lies outside the media root {root}" in message
    assert "a NUL character" in refusal(root, question_record(image="images/a\0.png"))
    # A path that leads back in is fine, and so is a root that is itself a link.
    linked = root.parent / "linked"
    linked.symlink_to(root)
    load_records(write(root, question_record(image="images/../images/a.png"), question_record()), linked)


def test_all_bad_records_are_counted_and_the_first_ten_named(root: Path) -> None:
    message = refusal(root, question_record(), *(question_record(image=f"images/{i}.png") for i in range(14)))
    assert "14 of 15 records cannot be used" in message
    assert message.count("  row ") == 10
    assert "row 11:" in message
    assert "row 12:" not in message
    assert "... and 4 more" in message


def test_skipping_is_explicit_and_names_what_it_left_out(root: Path) -> None:
    path = write(root, question_record(answer=""), question_record(), question_record(image="images/none.png"))
    samples, skipped = load_records(path, root, on_bad_record="skip")
    assert len(samples) == 1
    assert [(record.file, record.row) for record in skipped] == [(str(path), 1), (str(path), 3)]
    assert "does not exist" in skipped[1].reason
    with pytest.raises(RecordError, match="1 of 1 records"):
        load_records(write(root, question_record(answer="")), root, on_bad_record="skip")


def test_a_broken_line_is_one_bad_record_and_rows_are_line_numbers(root: Path) -> None:
    path = root / "records.jsonl"
    text = json.dumps(message_record("What\u2028is it?"), ensure_ascii=False)
    path.write_text(f"{text}\n\n{{'role': 1}}\n{text}\n", encoding="utf-8-sig")
    with pytest.raises(RecordError, match="row 3: the line is not valid JSON"):
        load_records(path, root)
    samples, skipped = load_records(path, root, on_bad_record="skip")
    assert len(samples) == 2
    assert [record.row for record in skipped] == [3]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"[{]", "not valid JSON"),
        ("a.json", b'{"id": 1}', "holds a JSON object; expected a list of records"),
        ("a.json", b"[]", "holds no records"),
        ("a.jsonl", b"\n", "holds no records"),
        ("a.json", b'["\xff"]', "not UTF-8 text"),
        ("a.csv", b"id,image", "expected one of .json, .jsonl"),
    ],
)
def test_a_file_that_is_no_list_of_records_is_refused(root: Path, name: str, content: bytes, reason: str) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(RecordError, match=reason) as caught:
        load_records(root / name, root)
    assert str(root / name) in str(caught.value)


def test_a_missing_file_is_refused(root: Path) -> None:
    with pytest.raises(RecordError, match="none.json cannot be read: No such file"):
        load_records(root / "none.json", root)


def test_records_in_a_pipe_are_refused_and_not_waited_for(root: Path) -> None:
    os.mkfifo(root / "pipe.jsonl")
    with pytest.raises(RecordError, match="pipe.jsonl is a named pipe .FIFO.; expected a regular file"):
        load_records(root / "pipe.jsonl", root)


def test_named_media_lists_what_the_records_name(root: Path) -> None:
    path = write(root, question_record(), train_record(image="b.png"), train_record(), {"image": "bad record"})
    assert named_media(path, root) == {root / "images/a.png", root / "b.png"}


def test_images_come_as_rgb_whatever_the_file_holds(root: Path) -> None:
    for mode in ("1", "L", "P", "RGBA", "CMYK"):
        path = root / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 4)).save(path)
        image = load_image(path)
        assert (image.mode, image.size) == ("RGB", (5, 4))


@pytest.mark.parametrize("n", [1, 2, 7, 100, 101])
@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("cap", [None, 1, 3, 1000])
def test_even_selection_is_even(n: int, fraction: float, cap: int | None) -> None:
    chosen = select_evenly(n, fraction, cap)
    assert len(chosen) == min(max(1, round(n * fraction)), cap or n)
    assert chosen[0] == 0
    assert chosen[-1] < n
    gaps = {b - a for a, b in zip(chosen, [*chosen[1:], n], strict=True)}
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(("n", "fraction", "cap"), [(0, 0.5, None), (5, 0.0, None), (5, 1.1, None), (5, 0.5, 0)])
def test_even_selection_refuses_what_it_cannot_do(n: int, fraction: float, cap: int | None) -> None:
    with pytest.raises(ValueError, match="expected"):
        select_evenly(n, fraction, cap)
