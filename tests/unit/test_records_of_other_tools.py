"""Records as other tools and benchmarks publish them: read as those tools read them, or refused by name."""

import json
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mllm_keeplora.data.conversation import MediaFile, Message, Part
from mllm_keeplora.data.record_files import HubTable, RecordError
from mllm_keeplora.data.records import load_records, read_records
from mllm_keeplora.data.stream import Stream, TaskSpec
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.task_files import write_task_files
from tests.conversations import read_copy

ASKED = {"image": "1.png", "question": "What is it?", "answer": "a cat"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with 1.png and 2.png; clips are named, never opened."""
    for number in (1, 2):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def outcome(root: Path, record: Any) -> tuple[Message, ...] | str:
    """The messages of the only record, which may be of text alone, or why it is refused."""
    (root / "r.json").write_text(json.dumps([record]))
    return outcome_of(root, root / "r.json")


def outcome_of(root: Path, file: Path) -> tuple[Message, ...] | str:
    samples, bad = read_records(file, root, allow_text_only=True, extracted=root / "extracted")
    return samples[1].messages if samples else bad[1]


def asks(*parts: Part, system: str | None = None) -> tuple[Message, ...]:
    messages = (Message("user", parts), Message("assistant", ("a cat",)))
    return messages if system is None else (Message("system", (system,)), *messages)


def shown(root: Path, name: str = "1.png") -> MediaFile:
    return MediaFile("image" if name.endswith("png") else "video", root / name)


def said(role: str, *content: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


def vsft_text(text: str) -> dict[str, Any]:
    return {"index": None, "text": text, "type": "text"}


def llava(question: str, **others: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}]
    return {"conversations": turns, **others}


def test_parts_that_count_their_images(root: Path) -> None:
    """HuggingFaceH4/llava-instruct-mix-vsft, on which TRL's own script for vision models trains."""
    first = {"index": 0, "text": None, "type": "image"}
    answer = said("assistant", vsft_text("a cat"))
    record = {"messages": [said("user", vsft_text("What is it?\n"), first), answer], "images": ["1.png"]}
    assert outcome(root, record) == asks("What is it?", shown(root))
    two = [said("user", first, {**first, "index": 1}, vsft_text("Which?")), answer]
    assert outcome(root, {"messages": two, "images": ["1.png", "2.png"]}) == asks(
        shown(root), shown(root, "2.png"), "Which?"
    )
    swapped = [said("user", {**first, "index": 1}, first, vsft_text("Which?")), answer]
    assert "index 1 is shown at place 0" in str(outcome(root, {"messages": swapped, "images": ["1.png", "2.png"]}))
    assert "has a part" in str(outcome(root, {"messages": [said("user", {**first, "index": "a"}), answer]}))


@pytest.mark.parametrize("question", ["<image>\nWhat is it?", "<video>\nWhat is it?", "What is it?"])
def test_llava_writes_image_for_a_clip(root: Path, question: str) -> None:
    """LLaVA-Video-178K has `<image>` where the clip of `video` is shown."""
    assert outcome(root, llava(question, video="1.mp4")) == asks(shown(root, "1.mp4"), "What is it?")


def test_two_places_for_one_clip_stay_refused(root: Path) -> None:
    assert "1 videos are named" in str(outcome(root, llava("<image> or <image>?", video="1.mp4")))


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_system_prompts(root: Path, key: str) -> None:
    """`system_prompt` is OpenOrca's."""
    record = {**ASKED, key: "Be brief."}
    assert outcome(root, record) == asks(shown(root), "What is it?", system="Be brief.")
    assert "keep one of them" in str(outcome(root, {**record, "system_prompt": "A", "system_message": "B"}))


@pytest.mark.parametrize(
    "others",
    [
        {"instruction": "Answer in one word."},
        {"prompt": "Answer in one word."},
        {"query": "And the dog?"},
        {"response": "a dog"},
        {"output": "a dog"},
        {"context": "A cat sat on a mat."},  # SQuAD
        {"inputs": "A cat sat on a mat."},  # M3IT
        {"hint": "It purrs."},  # ScienceQA
        {"choices": ["dog", "horse"]},  # A-OKVQA
        {"options": ["A. dog", "B. horse"]},  # MMMU
        {"options": {"A": "dog", "B": "horse"}},
        {"A": "dog", "B": "horse"},  # MMBench
        {"a0": "dog", "a1": "horse"},  # NExT-QA
        {"option_a": "dog"},
    ],
    ids=lambda others: next(iter(others)),
)
def test_what_belongs_to_the_question_or_the_answer_is_not_left_out(root: Path, others: dict[str, Any]) -> None:
    key = next(iter(others))
    assert f"it has {key!r}" in str(outcome(root, {**ASKED, **others}))
    words = " ".join(
        text
        for value in others.values()
        for text in (value if isinstance(value, list) else [value, ""])
        if isinstance(text, str)
    )
    if key not in ("query", "response", "output") and words.strip():
        written = {**ASKED, **others, "question": f"What is it? {words}"}
        assert outcome(root, written) == asks(shown(root), f"What is it? {words}".strip())


def test_mathematics_has_a_short_answer_beside_its_derivation(root: Path) -> None:
    """NuminaMath and its like, whose `solution` ends with the `answer`, and some with both as messages."""
    record = {"image": "1.png", "problem": "What is it?", "solution": "a cat"}
    assert outcome(root, {**record, "answer": "cat"}) == asks(shown(root), "What is it?")
    assert "it has 'answer' 'a dog' beside 'problem'" in str(outcome(root, {**record, "answer": "a dog"}))
    counted = {"problem": "What is it?", "solution": "so 12.5"}
    for number, said in ((12.5, True), (13, False), (True, True)):
        assert (str(outcome(root, {**counted, "answer": number})).startswith("it has 'answer'")) != said
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "I think of a cat."}]
    longer = outcome(root, {**record, "messages": messages})
    assert [message.text for message in longer] == ["What is it?", "I think of a cat."]  # type: ignore[union-attr]
    for other in ({"problem": "What is that?"}, {"solution": "a dog"}, {"solution": ["a cat", "a dog"]}):
        assert "several forms in one record, beginning with 'messages', 'problem'" in str(
            outcome(root, {**record, **other, "messages": messages})
        )
    # As in every other form, two questions with an answer each are one too many.
    assert "several forms" in str(outcome(root, {**record, "query": "What?", "response": "a dog"}))


def test_alpacas_text_is_the_record_once_more(root: Path) -> None:
    record = {"instruction": "What is it?", "input": "", "output": "a cat"}
    whole = "Below is an instruction.\n\n### Instruction:\nWhat is it?\n\n### Response:\na cat"
    assert outcome(root, {**record, "text": whole, "image": "1.png"}) == asks(shown(root), "What is it?")
    assert "it has 'text'" in str(outcome(root, {**record, "text": "Another question."}))


@pytest.mark.parametrize(
    "place",
    [
        "<image 1>",  # MMMU
        "<image_00>",  # MiniCPM-V
        "<|image_1|>",  # Phi
        "<ImageHere>",  # InternLM-XComposer
        "Picture 1: <img>1.png</img>",  # Qwen-VL
        "<|vision_start|><|image_pad|><|vision_end|>",
        "<start_of_image>",
        "<|image|>",
        "[IMG]",
        "<video_1>",
    ],
)
@pytest.mark.parametrize("media", [{}, {"image": "1.png"}], ids=["text alone", "image"])
def test_places_as_other_tools_write_them(root: Path, place: str, media: dict[str, Any]) -> None:
    assert "expected <image>" in str(outcome(root, llava(f"{place}\nWhat is it?", **media)))


def test_such_words_beside_our_own_place_or_in_an_answer_are_words(root: Path) -> None:
    assert outcome(root, llava("<image>\nWhat is <image 1>?", image="1.png")) == asks(shown(root), "What is <image 1>?")
    record = {"image": "1.png", "question": "How is it written?", "answer": "<image 1>"}
    assert outcome(root, record)[1] == Message("assistant", ("<image 1>",))  # type: ignore[comparison-overlap]


def test_a_place_in_the_system_prompt(root: Path) -> None:
    assert "the system's text has '<image>'" in str(outcome(root, {**ASKED, "system": "Look at <image>."}))


@pytest.mark.parametrize(
    "cut",
    [
        {"clip": [1.0, 2.5]},  # InternVL
        {"start": 0.0, "end": 4.5},  # VideoChat2
        {"start_time": 1, "end_time": 2},
        {"video_start": 1, "video_end": 2.5},
    ],
    ids=str,
)
def test_a_part_of_a_clip_is_not_shown_as_the_whole(root: Path, cut: dict[str, Any]) -> None:
    record = {"video": "1.mp4", "question": "What is it?", "answer": "a cat", **cut}
    assert "cut the file" in str(outcome(root, record))
    assert outcome(root, {**ASKED, **cut}) == asks(shown(root), "What is it?")
    unknown = {**record, **dict.fromkeys(cut)}
    assert outcome(root, unknown) == asks(shown(root, "1.mp4"), "What is it?")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Image", "1"),
        ("image_2", "2.png"),
        ("image2", "2"),
        ("img_path", ["2"]),
        ("IMAGES", ["2.png"]),
        ("video_1", "2"),
        ("frames", ["2.png"]),
        ("second_image_file", "2.heic"),
    ],
)
@pytest.mark.parametrize("media", [{}, {"image": "1.png"}], ids=["text alone", "image"])
def test_media_under_other_keys(root: Path, key: str, value: Any, media: dict[str, Any]) -> None:
    record = {"question": "What is it?", "answer": "a cat", **media, key: value}
    assert f"{key!r} seems to name a medium" in str(outcome(root, record))


@pytest.mark.parametrize("text", ["\u200b", "\ufeff", "\u2060\u00a0", "\u200e\u200f", "\u00ad"], ids=ascii)
def test_texts_without_anything_to_see(root: Path, text: str) -> None:
    assert outcome(root, {**ASKED, "answer": text}) == "no answer: it is empty"
    assert "it is empty" in str(outcome(root, {**ASKED, "question": text}))


@pytest.mark.parametrize("text", ["\U0001fae8", "\u05e9\u05dc\u05d5\u05dd", "a\u200bb", "\u200f\u0645"], ids=ascii)
def test_texts_with_marks_without_width_stay_as_they_are(root: Path, text: str) -> None:
    assert outcome(root, {**ASKED, "answer": text})[1] == Message("assistant", (text,))  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(
    "value", ["/9j/4AAQSkZJRg" * 400, "iVBORw0KGgo" * 40, "a/" * 3000], ids=["jpeg", "png", "path"]
)
@pytest.mark.parametrize("key", ["image", "video"])
def test_pictures_in_base64(root: Path, key: str, value: str) -> None:
    reason = str(outcome(root, {"question": "What is it?", "answer": "a cat", key: value}))
    assert "too long for a path" in reason and len(reason) < 300


def table(root: Path, **columns: Any) -> Path:
    pq.write_table(pa.table({name: pa.array([value]) for name, value in columns.items()}), root / "t.parquet")
    return root / "t.parquet"


VALUES = [datetime(2024, 5, 1), date(2024, 5, 1), time(10, 30), timedelta(hours=1), Decimal("1.50")]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "columns",
    [
        {"question": None, "answer": "a cat"},
        {"question": "What is it?", "answer": None},
        {"question": "What is it?", "answers": [None]},
        {"instruction": None, "input": "Now.", "output": "a cat"},
        {"instruction": "Now.", "input": None, "output": "a cat"},
        {"system": None, "query": "What is it?", "response": "a cat"},
        {
            "prompt": [said("user", {"type": "text", "text": None})],
            "completion": [{"role": "assistant", "content": "x"}],
        },
    ],
    ids=lambda columns: next(key for key, value in columns.items() if value != "What is it?"),
)
def test_dates_of_tables_are_no_texts(root: Path, columns: dict[str, Any], value: Any) -> None:
    """None stands for the date. As one of the user's own keys it does no harm."""

    def fill(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: fill(below) for key, below in item.items()}
        return [fill(below) for below in item] if isinstance(item, list) else value if item is None else item

    assert "text" in str(outcome_of(root, table(root, image="1.png", **fill(columns))))
    assert outcome_of(root, table(root, **ASKED, when=value)) == asks(shown(root), "What is it?")


@pytest.mark.parametrize("answers", [["2024-05-01", "2024-05-02"], ["2024-05-01T10:00:00", "2024-05-02T11:30:00"]])
@pytest.mark.parametrize("layout", ["json", "imagefolder"])
def test_dates_that_datasets_makes_of_texts(root: Path, layout: str, answers: list[str]) -> None:
    """In a dataset of JSON files, or a folder of images with a list of them."""
    folder = root / "folder"
    folder.mkdir()
    key, name = ("image", "train.jsonl") if layout == "json" else ("file_name", "metadata.jsonl")
    if layout == "imagefolder":
        (folder / "1.png").write_bytes(picture(root))
        answers = [answers[0]]
    rows = [{key: "1.png", "question": "When was it?", "answer": answer} for answer in answers]
    (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    samples, bad = read_records(HubTable(str(folder), "train"), root, extracted=root / "extracted")
    assert samples == {} and all("the answer is no text but a date or the like (2024" in why for why in bad.values())


def picture(root: Path) -> bytes:
    return (root / "1.png").read_bytes()


@pytest.mark.parametrize("column", ["question", "answer"])
def test_binary_columns_are_no_texts(root: Path, column: str) -> None:
    """Strings as old writers of parquet leave them; the path of what was extracted would be taught."""
    given = {"question": "What is it?", "answer": "a cat", column: b"a cat"}
    file = table(root, image={"bytes": picture(root), "path": "1.png"}, **given)
    assert "binary data in its table" in str(outcome_of(root, file))


@pytest.mark.parametrize("name", ["image_1", "photo", "images_2", "picture"])
def test_pictures_inside_tables_under_other_columns(root: Path, name: str) -> None:
    inside = {"bytes": picture(root), "path": None}
    file = table(root, question="What is it?", answer="a cat", **{name: inside})
    assert f"{name!r} seems to name a medium" in str(outcome_of(root, file))
    file = table(root, question="What is it?", answer="a cat", image=inside, **{name: inside})
    assert f"{name!r} seems to name a medium" in str(outcome_of(root, file))


@pytest.mark.parametrize(
    "name", ["\u56fe" * 120 + ".png", "\U0001f600" * 90, "a/..", ".", "x" * 300 + ".png"], ids=ascii
)
def test_long_and_odd_names_inside_tables(root: Path, name: str) -> None:
    file = table(root, question="What is it?", answer="a cat", image={"bytes": picture(root), "path": name})
    [asked, _] = outcome_of(root, file)
    assert asked.media[0].path.read_bytes() == picture(root)  # type: ignore[union-attr]


def test_accepted_answers_under_a_second_key_are_not_read_past(root: Path) -> None:
    """TextVQA and DocVQA rows list `answers`; `exact` would count one of them alone."""

    def write(**answers: Any) -> None:
        (root / "t.json").write_text(json.dumps([{"image": "1.png", "question": "What is it?", **answers}]))
        task = TaskSpec("cats", train="t.json", test="t.json", metric="exact")
        write_task_files(Stream("s", root, (task,), ()), root / "tasks")

    with pytest.raises(EvaluationError, match=r"cats: row 1 of .*t\.json has 'answers' beside 'answer'.*'kitten'"):
        write(answer="cat", answers=["cat", "kitten"])
    for same in ({"answer": "cat", "answers": ["cat"]}, {"answer": ["cat", "kitten"], "answers": ["kitten"]}):
        write(**same)
    write(answers=["cat", "kitten"])


@pytest.mark.parametrize(
    "wrong, metric, message",
    [
        ({"answers": ["no", "nope"]}, "exact", "'answers' beside 'answer'"),
        ({}, "vqa_accuracy", "has no answers"),
    ],
)
def test_a_row_is_the_records_not_the_questions(root: Path, wrong: Any, metric: str, message: str) -> None:
    """A record of several turns gives several questions."""
    chat = {"messages": [{"role": role, "content": "yes"} for role in ("user", "assistant") * 3]}
    rows = [chat, {}, {"question": "Is it?", "answer": "no"} | wrong]
    rows[0] |= {"answers": ["yes"]} if metric == "vqa_accuracy" else {}
    (root / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows if row))
    task = TaskSpec("cats", train="t.jsonl", test="t.jsonl", metric=metric, allow_text_only=True)
    with pytest.raises(EvaluationError, match=rf"row 2 of .*t\.jsonl .*{message}"):
        write_task_files(Stream("s", root, (task,), ()), root / "tasks")


@pytest.mark.parametrize(
    "key, value",
    [
        *(("loss_weight", 0.5), ("sample_weight", 0), ("loss_mask", [0, 1]), ("train_on_inputs", True)),
        *(("train_on_prompt", True), ("weight", 2.0), ("prefix", "Answer in French."), ("suffix", "Be brief.")),
        *(("pre_prompt", "Look."), ("post_prompt", "One word."), ("question_suffix", "One word.")),
    ],
)
def test_what_would_change_the_question_or_its_loss_is_refused(root: Path, key: str, value: object) -> None:
    assert f"it has {key!r}" in str(outcome(root, {**ASKED, key: value}))


@pytest.mark.parametrize("key", ["video_start", "video_end"])
def test_half_a_cut_of_a_clip_is_refused(root: Path, key: str) -> None:
    record = {"video": "c.mp4", "question": "What is it?", "answer": "a cat", key: 3}
    assert "clips are shown whole" in str(outcome(root, record))


@pytest.mark.parametrize(
    "key, value", [("nframes", 8), ("fps", 1.0), ("video_start", 2), ("max_frames", 4), ("max_pixels", 99)]
)
def test_settings_inside_a_part_are_refused(root: Path, key: str, value: object) -> None:
    """As qwen-vl-utils reads them."""
    parts = [{"type": "video", "video": "c.mp4", key: value}, {"type": "text", "text": "What is it?"}]
    record = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]}
    assert "has a part" in str(outcome(root, record))


@pytest.mark.parametrize(
    "more",
    [
        {"data_source": "0_30_s_academic_v0_1"},  # LLaVA-Video-178K
        {"frame_count": 900, "width": 640, "height": 480, "fps": 29.97, "duration": 30.0},  # NExT-QA, ActivityNet-QA
        {"nframes": 900, "num_frames": 900},
        {"loss_weight": 1.0, "sample_weight": 1, "train_on_inputs": False, "loss_mask": []},
        {"prefix": "What is it?", "suffix": "a cat"},  # PaliGemma's names for the same two
        {"source": "x", "type": "open", "question_type": "what", "category": "animal", "split": "train"},
    ],
)
def test_metadata_are_the_users_own(root: Path, more: dict[str, Any]) -> None:
    assert not isinstance(outcome(root, {**ASKED, **more}), str)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("name", ["r.json", "r.jsonl"])
def test_two_or_four_bytes_a_letter(root: Path, name: str, encoding: str) -> None:
    text = json.dumps(ASKED) if name == "r.jsonl" else json.dumps([ASKED])
    (root / name).write_bytes(text.encode(encoding))
    with pytest.raises(RecordError, match="is not UTF-8 text .*save it as UTF-8"):
        read_records(root / name, root)


def test_a_text_among_parts(root: Path) -> None:
    content = ["Look: ", {"type": "image", "image": "1.png"}]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a cat"}]}
    assert 'has \'Look: \' among its parts; expected {"type": "text"' in str(outcome(root, record))


def test_a_suffix_for_an_answer_where_several_are_accepted(root: Path) -> None:
    """The first counts, as in training."""
    rows = [{**ASKED, "answer": answer} for answer in ("yes", ["yes", "yeah"], ["no", "yes"])]
    (root / "t.json").write_text(json.dumps(rows))
    suffix = {"yes": " Yes or no?", "*": " Say."}
    task = TaskSpec("cats", train="t.json", test="t.json", metric="exact", test_prompt_suffix=suffix)
    write_task_files(Stream("s", root, (task,), ()), root / "tasks")
    [written] = (root / "tasks").glob("*.yaml")
    copy = yaml.safe_load(written.read_text())
    asked = [record["asked"][-1]["content"][-1]["text"] for record in read_copy(copy)]
    assert asked == ["What is it? Yes or no?", "What is it? Yes or no?", "What is it? Say."]


@pytest.mark.parametrize(
    "form", [("question", "answer"), ("text", "answer"), ("problem", "solution"), ("query", "response")]
)
@pytest.mark.parametrize("hidden", ["", " ", [], None])
def test_an_answer_that_is_not_read_may_be_empty(root: Path, form: tuple[str, str], hidden: Any) -> None:
    """Of general prompts, and of questions whose answers lie in another file; never of what is learnt."""
    asked, answer = form
    (root / "r.json").write_text(json.dumps([record := {asked: "What is it?", answer: hidden}]))
    samples, bad = load_records(root / "r.json", root, allow_text_only=True, answered=False)
    assert not bad and [m.role for m in samples[0].messages] == ["user"]
    assert "no answer" in str(outcome(root, record))
