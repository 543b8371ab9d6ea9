"""The built-in general prompts: their form, their pictures, what their README says, what they must not ask."""

import json
import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageChops
from sklearn.datasets import load_digits

from mllm_keeplora.recipes.general.draw_pictures import DRAWINGS
from mllm_keeplora.recipes.small import draw, draw_video
from mllm_keeplora.resources import shipped

FOLDER = shipped("recipes/general")
README = (FOLDER / "README.md").read_text()
RECORDS: list[dict[str, Any]] = [
    json.loads(line) for line in (FOLDER / "builtin.jsonl").read_text(encoding="utf-8").splitlines()
]
PICTURES_IN_ALL = 300 * 1024  # bytes: the wheel carries them
LONGEST = 300  # characters; with a picture's tokens, a prompt stays far below every model's context
PHRASE = 5  # words from which on the same words in another text are no accident

# Words that no prompt of another language has, and at least one of which every prompt of this language has.
WORDS = {
    "German": {"wie", "welches", "ein", "schreibe", "kannst", "den"},
    "French": {"quel", "combien", "réécris", "bonjour", "lisez"},
    "Spanish": {"cuál", "tengo", "escribe", "qué"},
    "Italian": {"qual", "il"},
    "Portuguese": {"oi", "você"},
}
LETTERS = {"Russian": "[а-я]", "Japanese": "[ぁ-ん]", "Chinese": "[一-鿿]"}


def parts(record: dict[str, Any], kind: str, role: str | None = None) -> list[str]:
    """The texts or the pictures of a record's messages, all of them or one role's."""
    messages = [message for message in record["messages"] if role in (None, message["role"])]
    return [part[kind] for message in messages for part in message["content"] if part["type"] == kind]


def normal(text: str) -> str:
    """The words alone, in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def asked(record: dict[str, Any]) -> list[str]:
    """What the user says, a message each, normalised."""
    return [
        normal(" ".join(part["text"] for part in message["content"] if part["type"] == "text"))
        for message in record["messages"]
        if message["role"] == "user"
    ]


def rows(title: str) -> list[list[str]]:
    """The cells of the table below a heading of the README, without its head."""
    lines = README.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return table[2:]


def test_a_record_is_a_talk_that_ends_with_a_question() -> None:
    for record in RECORDS:
        assert set(record) == {"id", "messages"}, record["id"]
        roles = [message["role"] for message in record["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], record["id"]
        for message in record["messages"]:
            assert set(message) == {"role", "content"}, record["id"]
            for part in message["content"]:
                assert set(part) == {"type", part["type"]}, record["id"]
                assert part["type"] in ("text", "image"), record["id"]
            texts = [part["text"] for part in message["content"] if part["type"] == "text"]
            assert texts and all(text and text == text.strip() for text in texts), record["id"]


def test_ids_count_within_their_category() -> None:
    met: Counter[str] = Counter()
    for record in RECORDS:
        category = record["id"].rpartition("-")[0]
        met[category] += 1
        assert record["id"] == f"{category}-{met[category]:03d}"
    order = [record["id"].rpartition("-")[0] for record in RECORDS]
    assert [name for name, before in zip(order, ["", *order], strict=False) if name != before] == list(met)


def test_the_readme_counts_categories_and_talks() -> None:
    counts = Counter(record["id"].rpartition("-")[0] for record in RECORDS)
    assert [(name, int(count)) for name, count, _ in rows("What they ask")] == list(counts.items())
    assert README.startswith(f"# The built-in general prompts\n\n{counts.total()} prompts")
    assert {record["id"].rpartition("-")[0] for record in RECORDS if parts(record, "image")} == {"picture"}
    pictured = [record for record in RECORDS if record["id"].startswith("picture")]
    assert all(parts(record, "image", "user") for record in pictured)
    assert 3 * len(pictured) == pytest.approx(len(RECORDS), abs=1)
    talks = Counter(record["id"].rpartition("-")[0] for record in RECORDS if len(record["messages"]) > 1)
    assert talks["chat"] == 5 and "five talks of two or three turns" in README
    special = [record for record in pictured if len(parts(record, "image")) > 1 or len(record["messages"]) > 1]
    assert len(special) == 5 and "Five of the pictured prompts" in README
    assert f"{len(DRAWINGS)} drawings" in README


def language(record: dict[str, Any]) -> str:
    """The language of a prompt, by its letters and by words that others do not have; what it quotes is left out."""
    text = re.sub(r"[\"“„«].*?[\"”“»]", "", " ".join(parts(record, "text"))).lower()
    for name, letters in LETTERS.items():
        if re.search(letters, text):
            return name
    found = [name for name, words in WORDS.items() if words & set(re.findall(r"\w+", text))]
    assert len(found) < 2, record["id"]
    return found[0] if found else "English"


def test_the_readme_counts_languages() -> None:
    spoken: dict[str, list[str]] = {}
    for record in RECORDS:
        spoken.setdefault(language(record), []).append(record["id"])
    table = {name: (int(count), ids) for name, count, ids in rows("In which languages")}
    assert table.pop("English") == (len(spoken.pop("English")), "all others")
    assert table == {name: (len(ids), ", ".join(ids)) for name, ids in spoken.items()}


def test_no_two_prompts_are_alike() -> None:
    def key(record: dict[str, Any]) -> tuple[str, ...]:
        return (normal(" ".join(parts(record, "text"))), *parts(record, "image"))

    keys = Counter(map(key, RECORDS))
    assert [alike for alike, count in keys.items() if count > 1] == []
    texts = Counter(normal(" ".join(parts(record, "text"))) for record in RECORDS)
    assert [text for text, count in texts.items() if count > 1] == []


def test_openings_vary() -> None:
    """Written one by one: three words that open many prompts are "what is the" alone, the form of many tasks."""
    openings = Counter(" ".join(asked(record)[0].split()[:3]) for record in RECORDS)
    (first, count), (_, second) = openings.most_common(2)
    assert first == "what is the" and 20 <= count <= len(RECORDS) / 8
    assert second <= 3


def test_prompts_are_short() -> None:
    longest = max(sum(map(len, parts(record, "text"))) for record in RECORDS)
    assert longest <= LONGEST
    assert re.search(r"The longest prompt has (\d+)\scharacters", README)[1] == str(longest)  # type: ignore[index]


def test_every_picture_is_there_and_asked_about() -> None:
    used = {name for record in RECORDS for name in parts(record, "image")}
    there = list((FOLDER / "images").iterdir())
    assert len({path.read_bytes() for path in there}) == len(there)
    assert used == {f"images/{path.name}" for path in there} == {f"images/{one.__name__}.png" for one in DRAWINGS}
    assert sum(path.stat().st_size for path in there) <= PICTURES_IN_ALL


@pytest.mark.parametrize("drawing", DRAWINGS, ids=lambda drawing: drawing.__name__)
def test_the_script_draws_what_is_shipped(drawing: Any) -> None:
    with Image.open(FOLDER / "images" / f"{drawing.__name__}.png") as image:
        assert image.mode == "RGB" and all(96 <= side <= 224 for side in image.size)
        drawn = drawing()
        assert drawn.size == image.size
        assert ImageChops.difference(drawn, image).getbbox() is None


def test_no_prompt_is_a_question_of_the_small_streams() -> None:
    rng, scans = np.random.default_rng(0), load_digits()
    drawings = [draw.digit(rng, scans.images[0], int(scans.target[0]))]
    for _ in range(60):
        drawings += [draw.scene(rng)[0], draw.chart(rng), draw.clock(rng), draw.ground(rng)]
    questions = {normal(question.text) for drawing in drawings for question in drawing.questions}
    for _ in range(4):
        clips = [draw_video.scene(rng, draw_video.SAMPLED)[0], draw_video.drift(rng, scans.images[0], 0)]
        clips += [domain(rng) for domain in draw_video.DOMAINS.values()]
        questions |= {normal(question.text) for clip in clips for question in clip.questions}
    assert "how many bars are there" in questions and "who wins the race" in questions
    assert [record["id"] for record in RECORDS if questions & set(asked(record))] == []


def test_no_prompt_stands_in_the_benchmarks_that_lmms_eval_ships() -> None:
    """Most benchmarks lie on the Hub; what lmms-eval has itself are few-shot examples and rules."""
    spec = find_spec("lmms_eval")
    if spec is None or spec.origin is None:
        pytest.skip("lmms-eval is not installed (extra: eval)")
    files = [path for path in (Path(spec.origin).parent / "tasks").rglob("*") if path.suffix in (".json", ".yaml")]
    texts = "\n".join(
        normal(path.read_text(encoding="utf-8", errors="replace")) for path in files if path.stat().st_size > 2000
    )
    assert normal("Statement 1 | Every element of a group generates a cyclic subgroup of the group.") in texts
    long = {question: record["id"] for record in RECORDS for question in asked(record) if question.count(" ") >= PHRASE}
    assert [name for question, name in long.items() if f" {question} " in texts] == []
