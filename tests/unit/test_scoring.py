"""Scoring functions of eval/tasks, and what is read from lmms-eval's results."""

import importlib.util
import json
import math
import re
import unicodedata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.score import _read_row, read_score
from mllm_keeplora.evaluation.task_files import TEMPLATES, ScoredTask

TASK = ScoredTask("birds", "task", "keeplora_s_birds", "exact", 1.0)


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


utils, rule_checks = load_module(TEMPLATES / "utils.py"), load_module(TEMPLATES / "follows.py")


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("Cat", "cat", 1),
        (" cat\n", "CAT ", 1),
        ("a cat", "cat", 0),
        ("cat.", "cat", 0),  # the benchmarks' rule is equality; a full stop is part of the reply
        ("", "cat", 0),
    ],
)
def test_exact_is_equality_without_case(reply: str, answer: str, score: int) -> None:
    assert utils.exact({"answer": answer}, [reply]) == {"exact": score}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [("It is a Cat.", "cat", 1), ("cat", "a cat", 0), ("", "cat", 0), ("black CAT", "Black cat", 1)],
)
def test_contains_looks_for_the_answer_in_the_reply(reply: str, answer: str, score: int) -> None:
    assert utils.contains({"answer": answer}, [reply]) == {"contains": score}


def test_a_list_of_answers_accepts_each() -> None:
    doc = {"answer": ["Open", "closed"]}
    assert utils.exact(doc, ["CLOSED"]) == {"exact": 1} and utils.exact(doc, ["shut"]) == {"exact": 0}
    assert utils.contains(doc, ["is open"]) == {"contains": 1} and utils.contains(doc, ["o"]) == {"contains": 0}
    assert utils.doc_to_target(doc) == "Open | closed"
    assert utils.doc_to_target({"answer_bbox": "[0,0,1,1]"}) == "[0,0,1,1]"


@pytest.mark.parametrize(
    ("rules", "right", "wrong"),
    [
        ({"word": "He"}, ["He", "It is He.", "(He)"], ["he", "The", "Helium", ""]),
        ({"word": "12"}, ["12", "7 + 5 = 12."], ["112", "120", "12th"]),
        ({"word": "bird", "without": "fish"}, ["A bird.", "a bird, not fishy"], ["a fish", "no bird but a fish", ""]),
        ({"times": ["Sea", 3]}, ["sea sea sea", "Sea, sea and SEA."], ["sea sea", "sea seas sea", "sea " * 4]),
        ({"at_most_words": 3}, ["one", "a b c"], ["a b c d", ""]),
        ({"items": 3}, ["a, b, c", "a,b,c."], ["a, b", "a, b, c, d", "a, b\nc, d", ""]),
        ({"bullets": 2}, ["* a\n* b", "Here:\n\n- a\n- b"], ["* a", "*a\n*b", "* a\n* b\n* c", ""]),
        ({"numbered": 2}, ["1. a\n2. b", "Here:\n1) a\n2) b"], ["1. a", "a 1. b 2. c", ""]),
        (
            {"json_keys": ["a", "b"]},
            ['{"a": 1, "b": 2, "c": 3}', '```json\n{"a": 1, "b": 2}\n```'],
            ['{"a": 1}', '["a", "b"]', '{"a": 1, "b"', "", "[" * 100_000],
        ),
        ({"begins": "Every"}, ["Every day", "\n Everyone"], ["every day", "On Every"]),
        ({"ends": "That is all."}, ["Rain. That is all.\n"], ["That is all", "That is all. No."]),
        ({"upper": True}, ["RAIN FALLS, 3 TIMES."], ["RAIN falls", "rain", "3", ""]),
    ],
)
def test_follows_is_all_rules_of_the_record(rules: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    doc = {"question_id": 1, "rules": rules}
    assert [reply for reply in right if rule_checks.follows(doc, [reply]) != {"follows": 1}] == []
    assert [reply for reply in wrong if rule_checks.follows(doc, [reply]) != {"follows": 0}] == []


def test_follows_reads_past_the_rules_that_a_tables_row_leaves_empty() -> None:
    doc = {"rules": {"word": "He", "numbered": None, "upper": None}}
    assert [rule_checks.follows(doc, [reply]) for reply in ("It is He.", "no")] == [{"follows": 1}, {"follows": 0}]


@pytest.mark.parametrize(
    "rules", [{}, None, "word", ["word"], {"words": "a"}, {"word": "a", "size": 3}, {"word": None}]
)
def test_follows_refuses_rules_that_it_does_not_know(rules: Any) -> None:
    with pytest.raises(ValueError, match="question_id 7: rules is .* expected an object with some of word, "):
        rule_checks.follows({"question_id": 7, "rules": rules}, ["a"])


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"numbered": "3"}, "a whole number"),
        ({"items": 2.0}, "a whole number"),
        ({"bullets": True}, "a whole number"),
        ({"at_most_words": "5"}, "a whole number"),
        ({"word": 5}, "a text"),
        ({"without": ""}, "a text"),
        ({"begins": ["a"]}, "a text"),
        ({"times": ["a"]}, "[text, whole number]"),
        ({"times": ["a", "2"]}, "[text, whole number]"),
        ({"json_keys": "name"}, "a list of texts"),
        ({"upper": "yes", "word": "a"}, "true or false"),
    ],
    ids=str,
)
def test_follows_refuses_values_that_no_reply_could_meet(rules: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"question_id 7: the rule '{next(iter(rules))}' is .* {re.escape(expected)}$"):
        rule_checks.follows({"question_id": 7, "rules": rules}, ["1. a\n2. b\n3. c"])


@pytest.mark.parametrize(
    ("rules", "score"),
    [
        ({"word": "café"}, 1),
        ({"without": "café"}, 0),
        ({"times": ["Café", 1]}, 1),
        ({"begins": "Un café"}, 1),
        ({"ends": "été"}, 1),
        ({"word": "cafe"}, 0),
    ],
    ids=str,
)
def test_follows_takes_composed_and_decomposed_accents_for_equal(rules: dict[str, Any], score: int) -> None:
    decomposed = json.loads(unicodedata.normalize("NFD", json.dumps(rules, ensure_ascii=False)))
    for asked in (rules, decomposed):
        for reply in ("Un café en été", unicodedata.normalize("NFD", "Un café en été")):
            assert rule_checks.follows({"rules": asked}, [reply]) == {"follows": score}


def test_contains_refuses_an_empty_answer() -> None:
    with pytest.raises(ValueError, match="question_id 7"):
        utils.contains({"question_id": 7, "answer": " "}, ["anything"])


def test_a_question_is_asked_as_the_copy_has_it() -> None:
    asked = [{"role": "user", "content": [{"type": "text", "text": "What is it? One word."}]}]
    assert utils.doc_to_messages({"asked": asked}) == asked


def test_every_metric_has_its_function_and_reports_its_own_name() -> None:
    for path in TEMPLATES.glob("[!_]*.yaml"):
        template = yaml.safe_load(path.read_text().replace("!function", ""))
        assert [metric["metric"] for metric in template["metric_list"]] == [path.stem]
        module, function = template["process_results"].split(".")
        assert function == path.stem
        doc = {"answer": "A", "image": "AI2D_1.png", "references": ["A"], "answers": ["A"] * 10}
        doc |= {"answer_type": "Doc-oriented VQA", "answer_bbox": "[0,0,1,1]"}
        box = "[0.0,0.0,1.0,1.00]"
        reply = {"coin_grounding": box, "next_grounding": box, "ctbench_number": "7"}.get(path.stem, "A")
        # GQA's truths are in lower case, others are no texts.
        other = {"coin_gqa": "a", "dcl_fin": "a", "ctbench_number": "7.0", "next_grounding": box}
        doc["answer"] = {**other, "next_textvqa": str(["A"] * 10)}.get(path.stem, "A")
        doc["rules"] = {"word": "A"}
        score = getattr(load_module(TEMPLATES / f"{module}.py"), function)(doc, [reply])
        captioned = {path.stem: {"caption": "A", "references": ["A"]}}
        assert score == (captioned if module == "captions" else {path.stem: 1.0})


def results(per_sample: list[Any], **scores: Any) -> dict[str, Any]:
    return {
        "results": {"keeplora_s_birds": {"alias": "birds", **scores}},
        "group_subtasks": {"keeplora_s_birds": []},
        "n-samples": {"keeplora_s_birds": {"original": 9, "effective": len(per_sample)}},
        "samples": {
            "keeplora_s_birds": [{"doc_id": i, "exact": x, "doc_hash": "same"} for i, x in enumerate(per_sample)]
        },
    }


def test_score_is_scaled_with_the_standard_error_of_a_mean() -> None:
    entry = ScoredTask("birds", "task", "keeplora_s_birds", "exact", 10.0)
    score = read_score(results([0.0, 10.0, 10.0, 4.0], **{"exact,none": 6.0}), entry)
    deviation = math.sqrt((36 + 16 + 16 + 4) / 3)
    assert score == {
        "value": 0.6,
        "native": 6.0,
        "native_max": 10.0,
        "stderr": pytest.approx(deviation / math.sqrt(4) / 10),
        "n": 4,
    }


@pytest.mark.parametrize("most", [100.0, 10.0], ids=["mvbench, mmvu, videomme", "tenths"])
def test_a_share_of_right_samples_in_another_unit_has_the_same_standard_error(most: float) -> None:
    samples = [{"score": score} for score in (1, 0, 0, 1, 1)]
    score = read_score(
        results(samples, **{"exact,none": 0.6 * most}), ScoredTask("g", "general", "keeplora_s_birds", "exact", most)
    )
    assert score["value"] == pytest.approx(0.6) and score["stderr"] == pytest.approx(math.sqrt(0.6 * 0.4 / 4))


def test_samples_in_lmms_evals_dictionary_form_have_a_standard_error() -> None:
    found = results([{"score": 1.0, "prediction": "yes"}, {"score": 0.0, "prediction": "no"}], **{"exact,none": 0.5})
    assert read_score(found, TASK)["stderr"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("per_sample", "native"),
    [([1.0], 1.0), ([1.0, 0.0, 1.0], 0.8), (["a", "b"], 0.5)],
    ids=["one sample", "not the samples' mean", "no number per sample"],
)
def test_standard_error_is_null_where_undefined(per_sample: list[Any], native: float) -> None:
    assert read_score(results(per_sample, **{"exact,none": native}), TASK)["stderr"] is None


@pytest.mark.parametrize(
    "scores",
    [
        {},
        {"f1,none": 0.5},
        {"exact,none": float("nan")},
        {"exact,none": "N/A"},
        {"exact,a": 0.5, "exact,b": 0.5},
    ],
    ids=["no score", "another score", "nan", "no number", "two filters"],
)
def test_missing_or_undefined_score_is_an_error_that_says_what_was_found(scores: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="'exact'.*found.*alias"):
        read_score(results([1.0, 0.0], **scores), TASK)


def test_one_filter_of_several_can_be_named() -> None:
    entry = ScoredTask("birds", "task", "keeplora_s_birds", "exact,b", 1.0)
    assert read_score(results([1.0, 0.0], **{"exact,a": 0.1, "exact,b": 0.5}), entry)["value"] == 0.5


def test_missing_task_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="other.*keeplora_s_birds"):
        read_score(results([1.0], **{"exact,none": 1.0}), ScoredTask("x", "task", "other", "exact", 1.0))


def test_unscored_document_is_an_error() -> None:
    found = results([1.0, 0.0], **{"exact,none": 0.5})
    found["n-samples"]["keeplora_s_birds"]["effective"] = 3
    with pytest.raises(EvaluationError, match="2 of 3 documents"):
        read_score(found, TASK)


def test_group_counts_the_samples_of_its_subtasks() -> None:
    found = results([1.0, 0.0], **{"exact,none": 0.5})
    found["results"]["group"] = {"exact,none": 0.5}
    found["group_subtasks"]["group"] = ["keeplora_s_birds"]
    score = read_score(found, ScoredTask("g", "general", "group", "exact", 1.0))
    assert score["n"] == 2 and score["stderr"] == pytest.approx(0.5)


def test_results_that_another_process_has_are_missed(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no results for birds: .*accelerate launch"):
        _read_row(None, [TASK], tmp_path)
