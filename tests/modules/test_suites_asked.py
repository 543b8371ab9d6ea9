"""Every task of the shipped suites, through lmms-eval's own code and our wrapper, on tiny models.

The documents are invented, their shapes are what the tasks' code reads: lmms-eval's `doc_to_*` and `process_results`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lmms_eval
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub.constants import HF_HOME
from lmms_eval.tasks import TaskManager
from PIL import Image

from mllm_keeplora.config import VideoConfig
from mllm_keeplora.data.conversation import Message
from mllm_keeplora.data.stream import GeneralSpec, Stream, TaskSpec
from mllm_keeplora.data.video.reader import Clip, VideoReader
from mllm_keeplora.evaluation import lmms_model, score
from mllm_keeplora.evaluation.entry_point import name_hub_home
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.evaluation.task_files import write_task_files
from mllm_keeplora.modeling.families import FAMILIES
from mllm_keeplora.modeling.loading import load_base
from tests.clips import write_clip
from tests.modules.conftest import model_config
from tests.modules.tiny_families import WRITING, save_tiny

SUITES = Path(__file__).resolve().parents[2] / "recipes/streams/suites"
TASKS = Path(lmms_eval.__file__).parent / "tasks"
FILMED = [family for family in FAMILIES if "video" in FAMILIES[family].vision_layers]
MVBENCH = sorted(path.stem.removeprefix("mvbench_") for path in (TASKS / "mvbench").glob("mvbench_*.yaml"))


def suite(name: str) -> tuple[GeneralSpec, ...]:
    return tuple(GeneralSpec(**entry) for entry in yaml.safe_load((SUITES / f"{name}.yaml").read_text()))


def picture(seed: int = 0, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def mme() -> list[dict[str, Any]]:
    asked = {"question_id": "code/1.png", "category": "code_reasoning", "image": picture(mode="L")}
    seen = {"question_id": "scene/2.jpg", "category": "scene", "image": picture()}
    pairs = [("Is it red? Please answer yes or no.", "Yes"), ("Is it blue? Please answer yes or no.", "No")]
    return [{**doc, "question": question, "answer": said} for doc in (asked, seen) for question, said in pairs]


def pope() -> list[dict[str, Any]]:
    doc = {"id": "0", "question_id": "1", "image": picture(), "image_source": "COCO", "category": "random"}
    return [{**doc, "question": "Is there a dog in the image?", "answer": answer} for answer in ("yes", "no")]


def seedbench() -> list[dict[str, Any]]:
    choices = {f"choice_{letter}": word for letter, word in zip("abcd", ("one", "two", "three", "four"), strict=True)}
    doc = {**choices, "answer": "A"}
    return [
        {**doc, "data_type": "image", "question_id": "1", "question": "How many stand?", "image": [picture()]},
        {
            **doc,
            "data_type": "video",
            "question_id": "v2",
            "question": "How many pass?",
            "image": [picture(n) for n in range(8)],
        },
    ]


def mmbench() -> list[dict[str, Any]]:
    doc = {"question": "What is it?", "A": "a cat", "B": "a dog", "answer": "A", "category": "identity"}
    shared = {**doc, "L2-category": "logic", "source": "x", "split": "dev", "image": picture()}
    return [
        {**shared, "index": 1, "hint": "nan", "C": "nan", "D": "nan"},
        {**shared, "index": 2, "hint": "Look.", "C": "a hat", "D": "a bat"},
    ]


def mmmu() -> list[dict[str, Any]]:
    images = {f"image_{number}": picture(number) for number in range(1, 8)}
    choice = {
        "question_type": "multiple-choice",
        "answer": "B",
        "explanation": "",
        "subfield": "x",
        "topic_difficulty": "Easy",
    }
    questions = [
        ("<image 1> What is it?", "['a', 'b']"),
        ("In <image 1> and later in <image 2>, what is it?", "['red', 'blue', 'green']"),
        ("What does it show? <image 1>", "['<image 2>', '<image 3>', '<image 4>', '<image 5>']"),
        ("The same <image 1> again <image 1>?", "['a', 'b']"),
        ("Nothing is shown?", "['yes', 'no']"),
    ]
    docs = [
        {**images, **choice, "id": f"validation_Art_{number}", "question": question, "options": options}
        for number, (question, options) in enumerate(questions)
    ]
    opened = {"question_type": "open", "answer": "7", "id": "validation_Math_9", "options": "[]"}
    return [*docs, {**docs[0], **opened, "question": "How many? <image 1>"}]


def ai2d() -> list[dict[str, Any]]:
    return [
        {"question": "Which?", "options": ["x", "y", "z", "w"], "answer": str(n), "image": picture()} for n in (0, 3)
    ]


def mvbench() -> list[dict[str, Any]]:
    return [{"video": "clip.mp4", "question": "What?", "candidates": ["a", "b", "c"], "answer": "b"}]


def nextqa() -> list[dict[str, Any]]:
    doc = {
        "video": 123,
        "frame_count": 8,
        "width": 64,
        "height": 48,
        "qid": 0,
        "type": "CW",
        **{f"a{n}": f"it {n}" for n in range(5)},
    }
    return [{**doc, "question": "why is it", "answer": n} for n in (0, 4)]


def longvideobench() -> list[dict[str, Any]]:
    doc = {"video_id": "v", "video_path": "clip.mp4", "question": "What?", "duration": 8.0, "duration_group": 15}
    options = {f"option{n}": word for n, word in enumerate(("a", "b", "c", "d", "N/A"))}
    more = {"id": "v_0", "question_category": "S2E", "topic_category": "x", "level": "L1-Perception"}
    return [{**doc, **options, **more, "correct_choice": n} for n in (0, 3)]


def mmvu() -> list[dict[str, Any]]:
    doc = {"id": "v", "video_path": "validation_all_files/Art/1.mp4", "video": "x/Art/1.mp4", "question": "What?"}
    return [
        {**doc, "question_type": "multiple-choice", "choices": dict(zip("ABCDE", "12345", strict=True)), "answer": "B"},
        {**doc, "question_type": "open-ended", "choices": dict.fromkeys("ABCDE", ""), "answer": "a tree"},
    ]


def videomme() -> list[dict[str, Any]]:
    doc = {"video_id": "001", "videoID": "clip", "duration": "short", "domain": "Knowledge", "question": "What?"}
    more = {"sub_category": "Astronomy", "task_type": "Counting Problem", "options": ["A. a", "B. b", "C. c", "D. d"]}
    return [{**doc, **more, "question_id": f"001-{n}", "answer": "A"} for n in (1, 2)]


DATA: dict[str, list[dict[str, Any]]] = {
    "lmms-lab-encoder/MME": mme(),
    "lmms-lab-encoder/POPE": pope(),
    "lmms-lab-encoder/SEED-Bench": seedbench(),
    "lmms-lab-encoder/MMBench": mmbench(),
    "lmms-lab-encoder/MMMU": mmmu(),
    "lmms-lab-encoder/ai2d": ai2d(),
    "OpenGVLab/MVBench": mvbench(),
    "lmms-eval/NExTQA": nextqa(),
    "longvideobench/LongVideoBench": longvideobench(),
    "lmms-eval/MMVU": mmvu(),
    "lmms-eval/Video-MME": videomme(),
}


def as_dataset(docs: list[dict[str, Any]]) -> DatasetDict:
    """With image columns, as the hub has them; under every split that a task may name."""
    rest = [
        {key: value for key, value in doc.items() if not key.startswith("image") or key == "image_source"}
        for doc in docs
    ]
    features = Dataset.from_list(rest).features
    for key in docs[0].keys() - rest[0].keys():
        several = isinstance(docs[0][key], list)
        features[key] = datasets.List(datasets.Image()) if several else datasets.Image()
    columns = {key: [doc.get(key) for doc in docs] for key in features}
    split = Dataset.from_dict(columns, features=features)
    return DatasetDict(dict.fromkeys(("test", "dev", "validation", "train"), split))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's cache, whose clips are there already."""
    root = tmp_path_factory.mktemp("hf_home")
    clip = root / "clip.mp4"
    write_clip(clip, list(np.random.default_rng(0).integers(0, 255, (8, 48, 64, 3), dtype=np.uint8)))
    places = ["nextqa/NExTVideo/123.mp4", "datasets/longvideobench/videos/clip.mp4", "videomme/data/clip.mp4"]
    places += ["mmvu/validation_all_files/Art/1.mp4"]
    from lmms_eval.tasks.mvbench.utils import DATA_LIST

    places += [f"mvbench_video/{folder}/clip.mp4" for folder in DATA_LIST.values()]
    for place in places:
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        if not (root / place).exists():
            (root / place).symlink_to(clip)
    return root


@pytest.fixture(autouse=True)
def hub(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """lmms-eval finds our documents where it asks the hub, and few enough tasks that listing them is quick."""
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.chdir(tmp_path)  # MMBench leaves a file where it runs
    from lmms_eval.tasks.mmvu import utils as mmvu_utils

    monkeypatch.setattr(mmvu_utils, "cache_dir_val", str(home / "mmvu"))
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **_: as_dataset(DATA[path]))


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that includes lmms-eval's own YAMLs of the suites' tasks."""
    folder = tmp_path_factory.mktemp("listed")
    for spec in (*suite("general_image"), *suite("general_video")):
        for path in TASKS.rglob(f"{spec.lmms_eval_task}.yaml"):
            content = yaml.unsafe_load(path.read_text().replace("!function", "")) or {}
            names = [f"mvbench_{name}" for name in MVBENCH] if "group" in content else [path.stem]
            for name in names:
                (folder / f"{name}.yaml").write_text(
                    yaml.safe_dump({"include": str(path.parent / f"{name}.yaml"), "task": name})
                )
            if "group" in content:
                (folder / path.name).write_text(yaml.safe_dump({"group": path.stem, "task": names}))
    return folder


_LIVE: dict[str, tuple[Any, Any]] = {}


def live(family: str, factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    if family not in _LIVE:
        directory = factory.mktemp(family)
        save_tiny(family, directory)
        _LIVE[family] = load_base(model_config(directory, "none"))
    return _LIVE[family]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[Message]]]:
    """The conversations that reach the model; replies stay short."""
    seen: list[list[Message]] = []
    read, reply = lmms_model._read_messages, lmms_model.generate_replies

    def recorded(*args: Any) -> list[Message]:
        seen.append(read(*args))
        return seen[-1]

    monkeypatch.setattr(lmms_model, "_read_messages", recorded)
    monkeypatch.setattr(lmms_model, "generate_replies", lambda *args, **rules: reply(*args[:-1], 2))
    yield seen


def row(
    name: str,
    names: list[str],
    family: str,
    factory: pytest.TempPathFactory,
    listed: Path,
    where: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> dict[str, score.Score]:
    """What a stage measures."""
    (where / "t.json").write_text(json.dumps([{"question_id": 0, "text": "what is this ?", "answer": "yes"}]))
    task = TaskSpec("t", train="t.json", test="t.json", metric="exact", allow_text_only=True)
    stream = Stream("s", where, (task,), suite(name))
    write_task_files(stream, where / "tasks")
    manager = TaskManager(
        include_path=[str(where / "tasks"), str(listed)], include_defaults=False, model_name="keeplora"
    )
    monkeypatch.setattr("lmms_eval.tasks.TaskManager", lambda **_: manager)
    model, processor = live(family, factory)
    reader = VideoReader(VideoConfig(frames=4), None)
    torch.manual_seed(0)
    return evaluate_row(
        model, processor, stream, where / "tasks", where / "out", reader=reader, names=names, batch_size=3, limit=None
    )


@pytest.mark.parametrize("family", WRITING)
def test_every_question_of_the_image_suite_is_asked(
    family: str, asked: list[Any], listed: Path, tmp_path: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = row(
        "general_image",
        [spec.name for spec in suite("general_image")],
        family,
        tmp_path_factory,
        listed,
        tmp_path,
        monkeypatch,
    )
    assert {name: found["n"] for name, found in scores.items()} == {
        "mme_perception": 4, "pope": 2, "seed_bench": 2, "mmbench": 2, "mmmu": 6, "ai2d": 2,
    }  # fmt: skip
    conversations = {text_of(messages): messages for messages in asked}
    shown = {
        text: [part for part in messages[-1].parts if not isinstance(part, str)]
        for text, messages in conversations.items()
    }

    def images(words: str) -> list[Any]:
        [found] = [media for text, media in shown.items() if words in text]
        assert all(isinstance(part, Image.Image) and part.mode == "RGB" for part in found)
        return found

    assert (len(images("How many stand")), len(images("How many pass"))) == (1, 8)
    assert len(images("later in")) == 2
    assert len(images("What does it show")) == 5
    assert images("Nothing is shown") == []
    [interleaved] = [messages[-1].parts for text, messages in conversations.items() if "later in" in text]
    assert [isinstance(part, str) for part in interleaved] == [True, False, True, False, True]
    assert [np.asarray(part).tolist() for part in images("later in")] == [
        np.asarray(picture(n)).tolist() for n in (1, 2)
    ]


def text_of(messages: list[Message]) -> str:
    return "|".join(message.text for message in messages)


@pytest.mark.parametrize("family", FILMED)
def test_every_question_of_the_video_suite_is_asked(
    family: str, asked: list[Any], listed: Path, tmp_path: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MVBench's twenty tasks ask in one way; one family for all of them.
    names = [spec.name for spec in suite("general_video") if family == FILMED[0] or spec.name != "mvbench"]
    scores = row("general_video", names, family, tmp_path_factory, listed, tmp_path, monkeypatch)
    expected = {"mvbench": len(MVBENCH), "nextqa": 2, "longvideobench": 2, "mmvu": 2, "video_mme": 2}
    expected = {name: number for name, number in expected.items() if name in names}
    assert {name: found["n"] for name, found in scores.items()} == expected
    assert len(asked) == sum(expected.values())
    for messages in asked:
        [message] = messages
        assert [type(part) for part in message.parts] == [Clip, str]


def test_the_hubs_cache_has_its_name_where_tasks_look_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """NExT-QA's code fails without, in the middle of a stage."""
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    name_hub_home()
    assert os.environ["HF_HOME"] == "/elsewhere"
    monkeypatch.delenv("HF_HOME")
    name_hub_home()
    assert os.environ["HF_HOME"] == HF_HOME


WORDS = {"type": "text", "text": "what is this ?"}
CUT = {"type": "video", "url": "a.mp4", "start_time": 1.0, "end_time": 2.0}
SHOWN = {"type": "image", "url": picture()}
ASKED = {"role": "user", "content": [WORDS]}
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no question": ([{"role": "assistant", "content": [WORDS]}], "a user's at the end"),
    "another role": ([{"role": "tool", "content": [WORDS]}, ASKED], "found roles"),
    "sound": ([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}], "found audio 'a.wav'"),
    "a part of a clip": ([{"role": "user", "content": [CUT]}], "a whole clip, found video 'a.mp4'"),
    "a clip as numbers": ([{"role": "user", "content": [{"type": "video", "url": [1, 2]}]}], "found video"),
    "an image in an answer": ([{"role": "assistant", "content": [SHOWN]}, ASKED], "found one in the assistant's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_refused_by_name(name: str) -> None:
    messages, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        lmms_model._read_messages(messages, VideoReader(VideoConfig(frames=4), None))


def test_turns_texts_and_a_webm_are_read(home: Path, tmp_path: Path) -> None:
    """lmms-eval takes .webm for sound."""
    (tmp_path / "a.webm").symlink_to(home / "clip.mp4")
    webm = {"type": "audio", "url": str(tmp_path / "a.webm")}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [WORDS, {"type": "text", "text": ""}, webm]},
        {"role": "assistant", "content": [WORDS]},
        {"role": "user", "content": [{"type": "image", "url": picture(mode="L")}, WORDS]},
    ]
    read = lmms_model._read_messages(messages, VideoReader(VideoConfig(frames=4), None))
    assert [message.role for message in read] == ["system", "user", "assistant", "user"]
    kinds = [[type(part) for part in message.parts] for message in read]
    assert kinds == [[str], [str, Clip], [str], [Image.Image, str]]
