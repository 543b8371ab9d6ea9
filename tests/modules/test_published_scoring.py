"""Published scores end to end: lmms-eval in process on a live tiny LLaVA, from stream to score and stderr.

What Java computes of captions is here too, so that its slow start comes once.
"""

import json
import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from mllm_keeplora.data.stream import Stream, TaskSpec
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.evaluation.task_files import TEMPLATES, write_task_files
from tests.modules import test_evaluation as shared
from tests.unit.test_scoring import load_module

# The tiny LLaVA, loaded, and a cache of datasets of our own.
base, live, datasets_cache = shared.base, shared.live, shared.datasets_cache

captions = load_module(TEMPLATES / "captions.py")


def in_java(test: Any) -> Any:
    """METEOR and the PTB tokenizer are Java programs."""
    without = pytest.mark.skipif(shutil.which("java") is None, reason="java is not here")
    return without(pytest.mark.usefixtures("one_meteor")(test))


@pytest.fixture(scope="module")
def one_meteor() -> Iterator[None]:
    """METEOR started once: it takes seconds to start, and then scores any number of corpora."""
    from pycocoevalcap.meteor import meteor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meteor, "Meteor", cache(meteor.Meteor))
        yield


def make_stream(root: Path, metric: str, **changes: Any) -> Stream:
    task = {"train": "test.json", "test": "test.json", "metric": metric, "max_new_tokens": 6, **changes}
    return Stream("published", root, (TaskSpec("pictures", **task),))


def evaluate(live: tuple[Any, Any], stream: Stream, where: Path, limit: int | None = None) -> Any:
    write_task_files(stream, where / "tasks")
    row = evaluate_row(*live, stream, where / "tasks", where / "out", batch_size=3, limit=limit)
    lines = (where / "out" / "pictures.jsonl").read_text().splitlines()
    return row["pictures"], [json.loads(line) for line in lines]


def write_captions(path: Path, references: list[list[str]]) -> None:
    """A COCO file; its annotations are in no order."""
    annotations = [
        {"image_id": number, "id": 10 * number + index, "caption": caption}
        for number, group in reversed(list(enumerate(references, start=1)))
        for index, caption in enumerate(group)
    ]
    images = [{"id": number} for number in range(1, len(references) + 1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


def caption(text: str, *references: str) -> dict[str, Any]:
    return {"caption": text, "references": list(references)}


@in_java
def test_corpus_metrics_against_hand_computed_ones() -> None:
    items = [
        caption("A cat sits on the mat.", "a cat sits on the mat", "the cat is here"),
        caption("two dogs", "two dogs run"),
        caption("", "a bird", "one bird"),
        caption("grün\u2028\nhouse", "a grün house"),
    ]
    scores = captions.corpus_metrics(items)
    # All 10 words of the replies are in their references; the closest references have 6 + 3 + 2 + 3 words.
    brevity = 2.718281828459045 ** (1 - 14 / 10)
    assert scores["BLEU-1"] == pytest.approx(brevity, rel=1e-6)
    # ROUGE-L with beta 1.2: F of precision 1 and recall 2/3, twice; 1; 0.
    f = (1 + 1.2**2) * (2 / 3) / (2 / 3 + 1.2**2)
    assert scores["ROUGE-L"] == pytest.approx((1 + 2 * f + 0) / 4)
    assert 0 < scores["METEOR"] < 1 and scores["CIDEr"] > 0
    assert list(scores) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    with mock.patch.object(captions, "corpus_metrics", lambda _: scores):  # Java takes seconds
        assert captions.corpus_score(items) == pytest.approx(100 * sum(scores.values()) / 7)


@pytest.mark.slow
@in_java
def test_corpus_score_falls_with_the_captions() -> None:
    references = [
        ("a cat on a mat", "one cat"),
        ("two dogs run fast", "dogs"),
        ("a red bus stops", "the bus"),
    ]
    right = [caption(first, first, second) for first, second in references]
    texts = [first for first, _ in references]
    shifted = [caption(text, *pair) for text, pair in zip(texts[1:] + texts[:1], references, strict=True)]
    assert captions.corpus_score(right) > 50 > captions.corpus_score(shifted)
    assert captions.corpus_score([caption("", *pair) for pair in references]) == pytest.approx(0, abs=1e-6)


@in_java
def test_captions_are_scored_as_one_corpus(live: tuple[Any, Any], tmp_path: Path) -> None:
    root = tmp_path / "data"
    shared.write_data(root, 4)
    write_captions(root / "coco.json", [["no such words", "none"]] * 4)
    stream = make_stream(root, "captions", references="coco.json")
    score, lines = evaluate(live, stream, tmp_path)
    replies = [line["reply"] for line in lines]
    assert len(set(replies)) > 2, "replies have to differ for the rest to mean something"
    assert score == {
        "value": pytest.approx(0, abs=1e-3),
        "native": pytest.approx(0, abs=0.1),
        "native_max": 100.0,
        "stderr": None,
        "n": 4,
    }
    assert [line["score"] for line in lines] == [None] * 4

    # What the model says, as its references: half right, and for the second half another image's words.
    references = [[replies[0], "x"], [replies[1]], [replies[3]], ["y", replies[2]]]
    write_captions(root / "coco.json", references)
    score, lines = evaluate(live, stream, tmp_path)
    items = [{"caption": c, "references": r} for c, r in zip(replies, references, strict=True)]
    assert score["native"] == pytest.approx(captions.corpus_score(items))
    assert score["value"] == pytest.approx(score["native"] / 100) and score["native"] > 10
    assert [line["doc"]["references"] for line in lines] == references

    # The first questions alone: scored against their own references, all right.
    subset, _ = evaluate(live, stream, tmp_path, limit=2)
    assert subset["n"] == 2 and subset["native"] == pytest.approx(captions.corpus_score(items[:2]))


def test_vqa_accuracy_is_a_mean_with_its_standard_error(live: tuple[Any, Any], tmp_path: Path) -> None:
    root = tmp_path / "data"
    records = shared.write_data(root, 3)

    def write_answers(answers: list[list[str]]) -> None:
        rows = [{**record, "answers": ten} for record, ten in zip(records, answers, strict=True)]
        (root / "test.json").write_text(json.dumps(rows))

    write_answers([["nothing"] * 10] * 3)
    stream = make_stream(root, "vqa_accuracy")
    score, lines = evaluate(live, stream, tmp_path)
    assert (score["value"], score["stderr"], score["n"]) == (0.0, 0.0, 3)

    # Nobody, two and ten of the people give the model's reply, in upper case and with an article.
    replies = [f"The {line['reply'].upper()}." for line in lines]
    write_answers([["nothing"] * 10, [replies[1]] * 2 + ["nothing"] * 8, [replies[2]] * 10])
    score, lines = evaluate(live, stream, tmp_path)
    assert [line["score"] for line in lines] == [0, pytest.approx(0.6), 1]
    assert score["native"] == score["value"] == pytest.approx(1.6 / 3)
    assert score["native_max"] == 1.0 and score["stderr"] == pytest.approx(0.2905933)
