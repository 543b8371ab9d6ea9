"""Records in the forms that other tools publish, hostile ones, tables, and the run's copy of a test file."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from mllm_keeplora.data.conversation import MediaFile, Message, Part
from mllm_keeplora.data.record_files import HubTable, RecordError
from mllm_keeplora.data.records import load_records, read_records
from mllm_keeplora.data.stream import Stream, StreamError, TaskSpec, data_hash
from mllm_keeplora.evaluation.task_files import follow_move, write_task_files
from tests.conversations import read_copy
from tests.unit.test_scoring import utils


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with 1.png .. 3.png; clips 1.mp4 and 2.mp4 are named, never opened."""
    root = tmp_path / "data"
    root.mkdir()
    for number in (1, 2, 3):
        Image.new("RGB", (8, 6), (number, 0, 0)).save(root / f"{number}.png")
    return root


def read(root: Path, record: Any, **settings: Any) -> tuple[Message, ...]:
    """The messages of the only record; it may be of text alone."""
    return read_all(root, record, **settings)[0]


def read_all(root: Path, *records: Any, **settings: Any) -> list[tuple[Message, ...]]:
    (root / "r.json").write_text(json.dumps(list(records)))
    samples, bad = read_records(root / "r.json", root, allow_text_only=True, **settings)
    assert bad == {}
    return [sample.messages for sample in samples.values()]


def problem(root: Path, record: Any) -> str:
    (root / "r.json").write_text(json.dumps([record]))
    samples, bad = read_records(root / "r.json", root, allow_text_only=True)
    assert samples == {}
    return bad[1]


def user(*parts: Part) -> Message:
    return Message("user", parts)


def says(text: str, *accepted: str, supervised: bool = True) -> Message:
    return Message("assistant", (text,), supervised, accepted)


def system(text: str) -> Message:
    return Message("system", (text,))


def chat(question: Any, answer: Any = "a", **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


# --- Forms as their tools publish them ---


def published(root: Path) -> dict[str, tuple[Any, tuple[Message, ...]]]:
    """Name -> (a record, its messages). Texts are those of the tools' own documentation."""
    one, two, three = (MediaFile("image", root / f"{n}.png") for n in (1, 2, 3))
    clip = MediaFile("video", root / "1.mp4")
    weather = {"role": "user", "content": "Tell me tomorrow's weather"}
    sunny = {"role": "assistant", "content": "Tomorrow's weather will be sunny"}
    rounds = (user("<query1>"), says("<response1>"), user("<query2>"), says("<response2>"))
    return {
        # haotian-liu/LLaVA docs/Finetune_Custom_Data.md; its code puts the image before the question.
        "llava": (
            {
                "id": "997bb945",
                "image": "1.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nRender a clear and concise summary of the photo."},
                    {"from": "gpt", "value": "select luxury furniture"},
                ],
            },
            (user(one, "Render a clear and concise summary of the photo."), says("select luxury furniture")),
        ),
        "llava, image behind": (
            {"image": "1.png", "text": "What is it?\n<image>", "answer": "a"},
            (user(one, "What is it?"), says("a")),
        ),
        "llava, image in a later turn": (
            {
                "image": "1.png",
                "conversations": [
                    {"from": "human", "value": "Hello"},
                    {"from": "gpt", "value": "Hi"},
                    {"from": "human", "value": "Which\n<image>"},
                    {"from": "gpt", "value": "a"},
                ],
            },
            (user("Hello"), says("Hi"), user(one, "Which"), says("a")),
        ),
        # huggingface/trl docs dataset_formats
        "trl messages": (
            chat("What color is the sky?", "It is blue."),
            (user("What color is the sky?"), says("It is blue.")),
        ),
        "trl prompt": (
            {"prompt": "The sky is", "completion": " blue."},
            (user("The sky is"), says("blue.")),
        ),
        "trl prompt of messages": (
            {
                "prompt": [{"role": "user", "content": "What color is the sky?"}],
                "completion": [{"role": "assistant", "content": "It is blue."}],
            },
            (user("What color is the sky?"), says("It is blue.")),
        ),
        "trl prompt with what was said before": (
            {
                "prompt": [weather, sunny, {"role": "user", "content": "And then?"}],
                "completion": [{"role": "assistant", "content": "Rain"}],
            },
            (user(weather["content"]), says(sunny["content"], supervised=False), user("And then?"), says("Rain")),
        ),
        # trl data_utils.prepare_multimodal_messages: images without a place stand before the first question.
        "trl images": (
            chat("What's in this image?", "a cat", images=["1.png", "2.png"]),
            (user(one, two, "What's in this image?"), says("a cat")),
        ),
        # trl docs, vision datasets
        "trl parts": (
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color?"}]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}],
                "images": ["1.png"],
            },
            (user(one, "What color?"), says("blue")),
        ),
        # modelscope/ms-swift docs Custom-dataset
        "swift messages": (
            {"messages": [{"role": "system", "content": "You are harmless"}, weather, sunny]},
            (system("You are harmless"), user(weather["content"]), says(sunny["content"])),
        ),
        "swift query": (
            {
                "system": "<system>",
                "query": "<query2>",
                "response": "<response2>",
                "history": [["<query1>", "<response1>"]],
            },
            (system("<system>"), *rounds),
        ),
        "swift several images": (
            chat(
                "<image><image>What is the difference between the two images?",
                "The first one is a kitten",
                images=["1.png", "2.png"],
            ),
            (user(one, two, "What is the difference between the two images?"), says("The first one is a kitten")),
        ),
        "swift image and video": (
            chat("<image>What is in the image, <video>What is in the video?", images=["1.png"], videos=["1.mp4"]),
            (user(one, "What is in the image, ", clip, "What is in the video?"), says("a")),
        ),
        "swift loss": (
            {
                "messages": [
                    {"role": "user", "content": "1 + 1?"},
                    {"role": "assistant", "content": "3", "loss": False},
                    {"role": "user", "content": "No."},
                    {"role": "assistant", "content": "2", "loss": True},
                ]
            },
            (user("1 + 1?"), says("3", supervised=False), user("No."), says("2")),
        ),
        # hiyouga/LLaMA-Factory data/README.md
        "factory alpaca": (
            {
                "instruction": "<query2>",
                "input": "more",
                "output": "<response2>",
                "system": "",
                "history": [["<query1>", "<response1>"]],
            },
            (*rounds[:2], user("<query2>\nmore"), says("<response2>")),
        ),
        "factory sharegpt": (
            {
                "conversations": [
                    {"from": "human", "value": "<image>human instruction"},
                    {"from": "gpt", "value": "model response"},
                    {"from": "human", "value": "and <image> this"},
                    {"from": "gpt", "value": "model response"},
                ],
                "system": "system prompt (optional)",
                "images": ["1.png", "2.png"],
            },
            (
                system("system prompt (optional)"),
                user(one, "human instruction"),
                says("model response"),
                user("and ", two, " this"),
                says("model response"),
            ),
        ),
        # data/mllm_demo.json of an older version: no placeholder
        "factory mllm demo": (
            {
                "messages": [
                    {"content": "Who are they?", "role": "user"},
                    {"content": "They're Kane and Gretzka from Bayern Munich.", "role": "assistant"},
                    {"content": "What are they doing?", "role": "user"},
                    {"content": "They are celebrating on the soccer field.", "role": "assistant"},
                ],
                "images": ["1.png"],
            },
            (
                user(one, "Who are they?"),
                says("They're Kane and Gretzka from Bayern Munich."),
                user("What are they doing?"),
                says("They are celebrating on the soccer field."),
            ),
        ),
        # QwenLM/Qwen2.5-VL README
        "qwen": (
            chat(
                [
                    {"type": "image", "image": f"file://{root}/1.png"},
                    {"type": "text", "text": "Identify the similarities between"},
                    {"type": "image", "image": "2.png"},
                    {"type": "video", "video": "1.mp4"},
                    {"type": "text", "text": "these."},
                ]
            ),
            (user(one, "Identify the similarities between", two, clip, "these."), says("a")),
        ),
        "openai": (
            chat([{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "3.png"}}]),
            (user("What?", three), says("a")),
        ),
        # yueluoshuangtian/MLLM-CTBench data/README.md; lmms-lab/multimodal-open-r1-8k-verified has the other keys
        "open-r1": (
            {
                "image": "1.png",
                "problem": "How many bars? Answer with a number.",
                "solution": "<think> I count them. </think> 3",
                "original_question": "How many bars?",
                "original_answer": "3",
            },
            (user(one, "How many bars? Answer with a number."), says("<think> I count them. </think> 3")),
        ),
        # CL-VISTA's answers are joined to its questions; names may lack the suffix.
        "cl-vista": (
            {"question_id": 0, "video_name": "1.mp4", "question": "<video>\nDoes the car stop?", "answer": "yes"},
            (user(clip, "Does the car stop?"), says("yes")),
        ),
    }


def test_records_are_read_as_their_tools_publish_them(root: Path) -> None:
    for name, (record, messages) in published(root).items():
        assert read(root, record) == messages, name


def test_every_form_asks_in_a_test_what_it_teaches_in_training(root: Path, tmp_path: Path) -> None:
    """The copy's last question and its context are the record's own messages."""
    for name, (record, messages) in published(root).items():
        (root / "r.json").write_text(json.dumps([record]))
        docs = copy_of(root, tmp_path / "tasks")
        asked, answered = docs[-1]["asked"], messages[-1]
        texts = [part["text"] for part in asked[-1]["content"] if part["type"] == "text"]
        assert "\n".join(texts) == messages[-2].text, name
        shown = [part["path"] for message in asked for part in message["content"] if part["type"] != "text"]
        assert shown == [str(file.path) for message in messages for file in message.media], name
        assert (asked[0]["role"] == "system") == (messages[0].role == "system"), name
        assert utils.accepted_answers(docs[-1]) == [answered.text], name


def copy_of(root: Path, tasks: Path, **changes: Any) -> list[dict[str, Any]]:
    task = TaskSpec("t", **{"train": "r.json", "test": "r.json", "metric": "exact", "allow_text_only": True, **changes})
    stream = Stream("s", root, (task,), extracted=root / "extracted")
    write_task_files(stream, tasks)
    return read_copy(yaml.safe_load((tasks / "keeplora_s_t.yaml").read_text()))


def test_answers_are_words_and_so_is_a_placeholder_in_them(root: Path) -> None:
    record = {"image": "1.png", "text": "Which word?", "answer": "<image> or <video>"}
    assert read(root, record)[1] == says("<image> or <video>")


@pytest.mark.parametrize(
    "record",
    [
        {"text": "?", "answer": ["open", "OPEN"]},
        {"query": "?", "response": ["open", "OPEN"]},
        {"instruction": "?", "output": ["open", "OPEN"]},
        {"prompt": "?", "completion": ["open", "OPEN"]},
        {"problem": "?", "solution": ["open", "OPEN"]},
        chat("?", ["open", "OPEN"]),
        {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": ["open", "OPEN"]}]},
    ],
)
def test_several_answers_count_in_every_form(root: Path, tmp_path: Path, record: Any) -> None:
    assert read(root, record) == (user("?"), says("open", "OPEN"))
    [doc] = copy_of(root, tmp_path / "tasks")
    assert [utils.exact(doc, [reply])["exact"] for reply in ("open", "Open", "shut")] == [1, 1, 0]
    assert doc["answer"] == ["open", "OPEN"]


@pytest.mark.parametrize("key", ["image", "images", "image_name", "image_path", "image_file", "image_paths"])
@pytest.mark.parametrize("asked", ["text", "question", "query", "prompt", "problem"])
def test_a_picture_beside_a_question_is_shown(root: Path, tmp_path: Path, key: str, asked: str) -> None:
    answer = {"query": "response", "prompt": "completion", "problem": "solution"}.get(asked, "answer")
    record = {asked: "What?", answer: "a", key: ["1.png"] if key.endswith("s") else "1.png"}
    assert read(root, record)[0].media == (MediaFile("image", root / "1.png"),)
    [doc] = copy_of(root, tmp_path / "tasks")
    assert [image.getpixel((0, 0)) for image in utils.doc_to_visual(doc)] == [(1, 0, 0)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"img": "1.png"}, "'img' seems to name a medium"),
        ({"picture": ["1.png"]}, "'picture' seems to name a medium"),
        ({"image": "1.png", "image2": "2.png"}, "'image2' seems to name a medium"),
        ({"image": "1.png", "images": ["2.png"]}, "images under 'image' and 'images'"),
        ({"rejected": "no"}, "'rejected'"),
        ({"rejected_response": "no"}, "'rejected_response'"),
        ({"chosen": [{"role": "user"}]}, "'chosen'"),
        ({"tools": "[]x"}, "'tools'"),
        ({"audios": ["1.wav"]}, "'audios'"),
        ({"objects": {"ref": ["a"]}}, "'objects'"),
        ({"loss_scale": [0.5]}, "'loss_scale'"),
        ({"loss": False}, "'loss'"),
        ({"label": False}, "'label' of true or false"),
        ({"history": [["a", "b"]]}, "'history' beside messages"),
        ({"query": "?", "response": "a"}, "several forms"),
        ({"image": "https://a.b/c.png"}, "write it to one"),
        ({"image": {"bytes": "AAAA", "path": None}}, "the image is a JSON object"),
        ({"id": True}, "the id is True, a JSON boolean"),
        ({"id": 1.5}, "the id is 1.5, a JSON number"),
        ({"id": [1]}, "the id is [1], a JSON list"),
        ({"system": ["a", 3]}, "'system'"),
    ],
)
def test_what_nothing_reads_is_refused_by_name(root: Path, change: dict[str, Any], reason: str) -> None:
    assert reason in problem(root, {**chat("What?"), **change})


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "assistant", "content": "a", "loss": 0.5}, "'loss' 0.5; expected true or false"),
        ({"role": "assistant", "content": "a", "loss": False}, "no answer to learn"),
        ({"role": "assistant", "content": "a", "loss": True, "train": False}, "contradict"),
        ({"role": "assistant", "content": "a", "tool_calls": [{}]}, "'tool_calls', which nothing here reads"),
        ({"role": "tool", "content": "a"}, "'tool'; expected one of user"),
        ({"role": "assistant", "content": [{"type": "image", "image": "1.png"}]}, "expected them in questions alone"),
        ({"role": "assistant", "content": [{"type": "audio", "audio": "1.wav"}]}, "has a part"),
        ({"role": ["assistant"], "content": "a"}, "expected one of"),
    ],
)
def test_what_a_message_cannot_say_is_refused(root: Path, message: dict[str, Any], reason: str) -> None:
    assert reason in problem(root, {"messages": [{"role": "user", "content": "?"}, message]})


def test_metadata_of_benchmarks_pass(root: Path) -> None:
    more = {"image_id": "COCO_1.jpg", "category": "x", "size": [3, 4], "source": "a.jpg", "type": "2D", "tools": []}
    assert read(root, {"image": "1.png", "text": "?", "answer": "a", **more})[1] == says("a")


def test_the_suffix_stands_behind_the_words_of_every_question(root: Path) -> None:
    record = {"images": ["1.png"], **chat("<image>What?")}
    assert read(root, record, prompt_suffix=" Go.")[0].parts[1] == "What? Go."
    openai = chat([{"type": "text", "text": "What?"}, {"type": "image", "image": "1.png"}])
    assert read(root, openai, prompt_suffix=" Go.")[0].parts[0] == "What? Go."


# --- Hostile values ---

GOOD = '{"text": "?", "answer": "a"}'
HOSTILE = {
    "half a surrogate pair": '{"text": "\\ud800", "answer": "a"}',
    "a surrogate in a key": '{"text": "?", "answer": "a", "\\udfff": 1}',
    "NUL": '{"text": "a\\u0000b", "answer": "a"}',
    "deep lists": f'{{"text": "?", "answer": "a", "x": {"[" * 60}{"]" * 60}}}',
    "a long number": f'{{"text": "?", "answer": "a", "id": {"7" * 5000}}}',
    "NaN": '{"text": "?", "answer": "a", "x": NaN}',
    "Infinity": '{"text": "?", "answer": "a", "x": -Infinity}',
    "beyond floating point": '{"text": "?", "answer": "a", "x": 1e999}',
    "a key twice": '{"text": "?", "answer": "a", "answer": "b"}',
    "a key twice within": '{"text": "?", "answer": "a", "x": [{"a": 1, "a": 2}]}',
    "an integer": "3",
    "null": "null",
    "a list as id": '{"text": "?", "answer": "a", "id": []}',
    "a name too long": f'{{"text": "?", "answer": "a", "video": "{"x" * 5000}/../../../y"}}',
}


@pytest.mark.parametrize("name", [".json", ".jsonl", ".json.gz"])
@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE)
def test_hostile_values_are_refused_with_their_row(root: Path, name: str, value: str) -> None:
    text = f"{GOOD}\n{value}\n{GOOD}\n" if "l" in name else f"[{GOOD},\n{value},{GOOD}]"
    path = root / f"r{name}"
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    samples, bad = read_records(path, root, allow_text_only=True)
    assert ([*samples], [*bad]) == ([1, 3], [2])


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl", b"[" * 200_000, "row 1: lists and objects within each other"),
        ("a.json", b"[" * 200_000, "row 1: lists and objects within each other"),
        ("a.json", b"[1,]", "row 2: not valid JSON"),
        ("a.json", b"[{} {}]", "row 1: not valid JSON"),
        ("a.json", b"[{}", "row 1: not valid JSON"),
        ("a.json", b"[] []", "follows the list"),
        ("a.json", b"3", "holds a JSON number"),
        ("a.json", b"\xef\xbb\xbfnull", "holds a JSON null"),
        ("a.json", "[]".encode("utf-16"), "not UTF-8"),
        ("a.jsonl", f"{GOOD} {GOOD}\n".encode(), "row 1: more than one JSON value"),
        ("a.json.gz", b"[]", "cannot be read"),
        ("a.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
    ],
)
def test_files_that_are_no_records_are_refused(root: Path, name: str, data: bytes, reason: str) -> None:
    (root / name).write_bytes(data)
    with pytest.raises(RecordError) as caught:
        load_records(root / name, root, allow_text_only=True)
    assert reason in str(caught.value) and str(root / name) in str(caught.value)


def test_a_device_is_no_file_of_records(root: Path) -> None:
    os.mkfifo(root / "r.json")
    with pytest.raises(RecordError, match="named pipe .FIFO.; expected a regular file"):
        read_records(root / "r.json", root)


# --- Tables ---


def picture(root: Path, number: int) -> dict[str, Any]:
    return {"bytes": (root / f"{number}.png").read_bytes(), "path": f"AI2D_{number}.png"}


def test_a_parquet_file_holds_its_images(root: Path, tmp_path: Path) -> None:
    rows = [{"image": picture(root, n), "text": f"<image>{n}?", "answer": str(n), "when": None} for n in (1, 2)]
    pq.write_table(pa.Table.from_pylist(rows), root / "t.parquet")
    samples, bad = read_records(root / "t.parquet", root, extracted=tmp_path / "extracted")
    assert bad == {}
    files = [sample.media[0].path for sample in samples.values()]
    assert [file.read_bytes() for file in files] == [row["image"]["bytes"] for row in rows]
    assert [file.name for file in files] == ["AI2D_1.png", "AI2D_2.png"]
    docs = copy_of(root, tmp_path / "tasks", test="t.parquet", train="t.parquet", metric="dcl_sci")
    assert [Path(doc["image"]).name for doc in docs] == ["AI2D_1.png", "AI2D_2.png"]


def test_a_parquet_file_of_datasets_with_lists_of_images_and_parts(root: Path, tmp_path: Path) -> None:
    record = chat([{"type": "image", "text": None}, {"type": "text", "text": "What?"}], images=[str(root / "1.png")])
    record["messages"][1]["content"] = [{"type": "text", "text": "a"}]
    table = datasets.Dataset.from_list([record]).cast_column("images", datasets.List(datasets.Image()))
    table.to_parquet(root / "t.parquet")
    samples, bad = read_records(root / "t.parquet", root, extracted=tmp_path / "extracted")
    assert bad == {}
    messages = samples[1].messages
    assert messages[0].parts[0].path.read_bytes() == (root / "1.png").read_bytes()
    assert messages[0].parts[1:] == ("What?",) and messages[1] == says("a")


def hub_folder(root: Path, answer: str = "cat") -> Path:
    """A dataset as the hub lays it out: a card and parquet files named by split."""
    folder = root / "hub"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list([{"picture": str(root / "1.png"), "ask": "What?", "label_text": answer}])
    table.cast_column("picture", datasets.Image()).to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder


TABLE = {"dataset": "hub", "split": "train", "columns": {"image": "picture", "text": "ask", "answer": "label_text"}}


def test_a_dataset_of_the_hub_with_its_columns(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    hub_folder(root)
    task = TaskSpec("t", train=TABLE, test=TABLE, metric="exact")
    stream = Stream("s", root, (task,), extracted=tmp_path / "extracted")
    source = stream.train_file(task)
    assert isinstance(source, HubTable)
    samples, bad = read_records(source, root, extracted=stream.extracted)
    assert bad == {} and samples[1].id == "hub:1" and samples[1].answers == ("cat",)
    assert samples[1].media[0].path.read_bytes() == (root / "1.png").read_bytes()
    write_task_files(stream, tmp_path / "tasks")
    [doc] = read_copy(yaml.safe_load((tmp_path / "tasks/keeplora_s_t.yaml").read_text()))
    assert (doc["text"], doc["answer"]) == ("What?", "cat")
    assert data_hash(stream, task) == data_hash(stream, task)
    with pytest.raises(RecordError, match="has no column nothing; its columns are picture, ask"):
        read_records(HubTable(source.dataset, "train", columns={"text": "nothing"}), root)
    with pytest.raises(RecordError, match=r"split none\) cannot be read"):
        read_records(HubTable(source.dataset, "none"), root)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"splt": "train"}, "unknown key 'splt'"), ({"split": 3}, "expected text"), ({"columns": ["a"]}, "expected text")],
)
def test_a_dataset_entry_is_checked(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(StreamError, match=reason):
        TaskSpec("t", train={**TABLE, **change}, test="r.json", metric="exact")


# --- The run's copy ---


def test_nothing_is_inferred_in_the_copy(root: Path, tmp_path: Path) -> None:
    answers = ["2024-05-01", "12:30", "1e5", ["2024-05-01", "x"], "\u2028 \u0085x", "true"]
    records = [{"question_id": n, "text": "?", "answer": a, "n": n if n else "zero"} for n, a in enumerate(answers)]
    (root / "r.json").write_text("\ufeff" + json.dumps(records, ensure_ascii=False), encoding="utf-8")
    copy_of(root, tmp_path / "tasks")
    task = yaml.safe_load((tmp_path / "tasks/keeplora_s_t.yaml").read_text())
    files = task["dataset_kwargs"]["data_files"]
    loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "hf"))["test"]
    docs = list(utils.process_docs(loaded))  # as lmms-eval takes them
    assert [doc["answer"] for doc in docs] == answers
    assert [doc["n"] for doc in docs] == ["zero", 1, 2, 3, 4, 5]
    assert utils.process_docs(loaded)[3] == docs[3]
    assert all(utils.exact(doc, [utils.accepted_answers(doc)[-1].strip()])["exact"] for doc in docs)


def test_a_file_replaced_at_the_same_path_and_time_gives_new_questions(root: Path, tmp_path: Path) -> None:
    seen = []
    for answer in ("one", "two"):
        (root / "r.json").write_text(json.dumps([{"text": "?", "answer": answer}]))
        os.utime(root / "r.json", (1, 1))
        copy_of(root, tmp_path / "tasks")
        task = yaml.safe_load((tmp_path / "tasks/keeplora_s_t.yaml").read_text())
        files = task["dataset_kwargs"]["data_files"]
        os.utime(files["test"], (1, 1))
        loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "hf"))["test"]
        seen.append(utils.process_docs(loaded)[0]["answer"])
    assert seen == ["one", "two"]
    assert len(list((tmp_path / "tasks").glob("*.parquet"))) == 1


def test_copies_are_each_tasks_own_and_follow_a_moved_run(root: Path, tmp_path: Path) -> None:
    (root / "r.json").write_text(GOOD.join("[]"))
    tasks = tuple(TaskSpec(name, "r.json", "r.json", "exact", allow_text_only=True) for name in ("a-b", "a"))
    for _ in range(2):
        write_task_files(Stream("s", root, tasks), tmp_path / "run/tasks")
    (tmp_path / "run").rename(tmp_path / "moved")
    follow_move(tmp_path / "moved/tasks")
    for task in tasks:
        text = (tmp_path / f"moved/tasks/keeplora_s_{task.name}.yaml").read_text()
        assert [doc["answer"] for doc in read_copy(yaml.safe_load(text))] == ["a"]


def test_turns_are_asked_apart_where_they_are_about_one_picture(root: Path, tmp_path: Path) -> None:
    turns = [("human", "<image>\nWhat?"), ("gpt", "bird"), ("human", "Male?"), ("gpt", "yes")]
    said = [{"from": role, "value": text} for role, text in turns]
    (root / "r.json").write_text(
        json.dumps([{"id": "x", "image": "1.png", "system": "Be brief", "conversations": said}])
    )
    docs = copy_of(root, tmp_path / "tasks", prompt_suffix=" Go.", test_prompt_suffix={"yes": " Yes?", "*": ""})
    assert [(doc["question_id"], doc["text"], doc["answer"]) for doc in docs] == [
        ("x-0", "What?", "bird"),
        ("x-1", "Male?", "yes"),
    ]
    picture = {"type": "image", "path": str(root / "1.png")}
    for doc, text in zip(docs, ("What? Go.", "Male? Go. Yes?"), strict=True):
        assert [message["role"] for message in doc["asked"]] == ["system", "user"]
        assert doc["asked"][1]["content"] == [picture, {"type": "text", "text": text}]


def test_turns_keep_what_came_before_where_it_is_their_context(root: Path, tmp_path: Path) -> None:
    record = {
        "images": ["1.png", "2.png"],
        "messages": [
            {"role": "user", "content": "<image>What?"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "<image>And this?"},
            {"role": "assistant", "content": "two"},
        ],
    }
    (root / "r.json").write_text(json.dumps([record]))
    docs = copy_of(root, tmp_path / "tasks")
    assert [[message["role"] for message in doc["asked"]] for doc in docs] == [["user"], ["user", "assistant", "user"]]
    # An answer that is not learnt is no question, but context.
    record["messages"][1]["loss"] = False
    (root / "r.json").write_text(json.dumps([record]))
    [doc] = copy_of(root, tmp_path / "tasks")
    assert doc["answer"] == "two" and len(doc["asked"]) == 3


def test_a_scoring_function_gets_the_record_as_it_was_written(root: Path, tmp_path: Path) -> None:
    record = {"question_id": 7, "image": "1.png", "text": "<image>\nWhat?", "answer": " a ", "answer_type": {"x": [1]}}
    (root / "r.json").write_text(json.dumps([record]))
    [doc] = copy_of(root, tmp_path / "tasks")
    assert {key: doc[key] for key in record} == record


def test_accents_are_equal_however_they_are_written() -> None:
    for truth, reply in (("cafe\u0301", "caf\u00e9"), ("caf\u00e9", "CAFE\u0301"), ("\uac00", "\u1100\u1161")):
        assert utils.exact({"answer": truth}, [reply]) == {"exact": 1}
        assert utils.contains({"answer": truth}, [f"a {reply}!"]) == {"contains": 1}
