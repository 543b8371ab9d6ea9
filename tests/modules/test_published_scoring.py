"""Published scores end to end: lmms-eval in process on a live tiny LLaVA, from stream to score and stderr."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mllm_keeplora.data.stream import Stream, TaskSpec
from mllm_keeplora.evaluation.score import evaluate_row
from mllm_keeplora.evaluation.task_files import TEMPLATES, write_task_files
from tests.modules import test_evaluation as shared
from tests.unit.test_scoring import load_module

# The tiny LLaVA, loaded, and a cache of datasets of our own.
base, live, datasets_cache = shared.base, shared.live, shared.datasets_cache

JAVA = shutil.which("java")


def make_stream(root: Path, metric: str, **changes: Any) -> Stream:
    task = {"train": "test.json", "test": "test.json", "metric": metric, "max_new_tokens": 6, **changes}
    return Stream("published", root, (TaskSpec("pictures", **task),))


def evaluate(live: tuple[Any, Any], stream: Stream, where: Path, limit: int | None = None) -> Any:
    write_task_files(stream, where / "tasks")
    row = evaluate_row(*live, stream, where / "tasks", where / "out", batch_size=3, limit=limit)
    lines = (where / "out" / "pictures.jsonl").read_text().splitlines()
    return row["pictures"], [json.loads(line) for line in lines]


def write_captions(path: Path, captions: list[list[str]]) -> None:
    """A COCO file; its annotations are in no order."""
    annotations = [
        {"image_id": number, "id": 10 * number + index, "caption": caption}
        for number, group in reversed(list(enumerate(captions, start=1)))
        for index, caption in enumerate(group)
    ]
    images = [{"id": number} for number in range(1, len(captions) + 1)]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))


@pytest.mark.skipif(JAVA is None, reason="METEOR and the PTB tokenizer are Java programs; java is not here")
@pytest.mark.usefixtures("one_meteor")
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
    captions = load_module(TEMPLATES / "captions.py")
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
