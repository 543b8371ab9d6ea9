"""A score that is said to be settled is: every scoring function of eval/tasks gives any continuation the same.

Whatever ends in `CUT_MARK` is one continuation, so that is what a saved reply scores as well.
"""

from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mllm_keeplora.evaluation.settled import CUT_MARK, RULES, settled
from mllm_keeplora.evaluation.task_files import SCORED_BY, TEMPLATES
from tests.unit.test_scoring import load_module

METRICS = sorted(path.stem for path in TEMPLATES.glob("[!_]*.yaml"))

# What lower case, canonical forms, white space, number words and the rules themselves trip over.
PIECES = [
    *("a", "e", "E", "the", "two", "cat", "Cat", "house", "B", "1", "0.5", "é", "é", "E", "\u0301", "\u0323", "\u0345"),
    *("Σ", "σ", "ς", "ΑΣ", "İ", "ı", "ß", "ẞ", "K", "Å", "각", "ᄀ", "ᅡ", "ᆨ", "東", "�"),
    *(" ", "  ", "\n", "\t", "\u2003", ".", ". ", ",", ", ", "'", "'s", "dont", "-", "/", "[", "]", "Unanswerable"),
]
# Characters that are an answer's, and words at the end.
SHAPES = st.tuples(st.integers(0, 12), st.sampled_from([0, 0, 3, 50]))


def scoring_function(metric: str) -> Any:
    """As lmms-eval finds it: the template names file and function."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: node.value)
    named = yaml.load((TEMPLATES / f"{metric}.yaml").read_text(encoding="utf-8"), Loader)["process_results"]
    module, function = named.split(".")
    return getattr(load_module(TEMPLATES / f"{module}.py"), function)


FUNCTIONS = {metric: scoring_function(metric) for metric in METRICS}


def document(metric: str, answers: list[str]) -> dict[str, Any]:
    """A record that the metric can read."""
    one = {"coin_science_qa": "B", "coin_imagenet": answers[0]}.get(metric)
    several = metric in ("exact", "contains")
    return {
        SCORED_BY: metric,
        "answer": answers if several else one or answers[0],
        "answers": [answers[n % len(answers)] for n in range(10)],
        "references": ["a cat"],
    }


def score(doc: dict[str, Any], reply: str) -> Any:
    """What the wrapper makes of a reply, scored; a refused record is a result as well."""
    metric = doc[SCORED_BY]
    try:
        return FUNCTIONS[metric](doc, [reply.strip()])[metric]
    except ValueError as error:
        return str(error)


def test_every_rule_is_that_of_a_score() -> None:
    assert set(RULES) < set(METRICS)


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric not in RULES])
def test_scores_without_a_rule_never_settle(metric: str) -> None:
    assert settled([document(metric, ["cat"])]) is None
    assert settled([document("exact", ["cat"]), document(metric, ["cat"])]) is None
    assert settled([]) is None and settled([{}]) is None  # lmms-eval's own tasks


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), min_size=3, max_size=5), shape=SHAPES)
@example(["e", "\u0301", "é"], (0, 0))
@example(["a cafe", "\u0301", "cafe"], (0, 0))
@example(["ΑΣ", "α", "ΑΣ"], (0, 0))
@example(["ΑΣ.", "α", "ας"], (0, 0))
@example(["가", "ᆨ", "각"], (0, 0))
@example(["abcd efgh ijkl", " mnop", "a/b/c/d"], (0, 0))
@example(["house house", " house", "a-house"], (0, 0))
@example(["red", "", "\tred"], (0, 0))
@example(["A", " cat", "B"], (0, 0))
@example(["A.", " B", "B"], (0, 0))
@example(["x y", "z B", "B"], (0, 0))
@example(["", "", "cat"], (0, 50))
def test_what_is_settled_scores_alike_however_it_goes_on(texts: list[str], shape: tuple[int, int]) -> None:
    """A reply that begins like an answer, then goes its own way, for some words more."""
    begun, rest, *answers = texts
    of_an_answer, words = shape
    begun = answers[0][:of_an_answer] + begun + " house" * words
    for metric in RULES:
        doc = document(metric, answers)
        enough = settled([doc])
        assert enough is not None
        if enough(begun.strip()):
            expected = score(doc, begun)
            assert (metric, score(doc, begun + rest)) == (metric, expected)
            assert (metric, score(doc, begun + CUT_MARK)) == (metric, expected)


@pytest.mark.parametrize(
    ("metric", "answer", "reply", "enough"),
    [
        ("exact", "Red bus", "The picture shows", True),
        ("exact", "Red bus", "red bus and", True),
        ("exact", "Red bus", "RED b", False),
        ("exact", "Red bus", "red bus.", False),  # nothing else than a full stop: a rule for all need not see it
        ("coin_gqa", "yes", "Yes, it is", True),
        ("coin_ocrvqa", "Jane Doe", "The author", True),
        ("dcl_fin", "Up 3", "Down", True),
        ("contains", "Paris", "It is Paris, which", True),
        ("contains", "Paris", "It is Paris", False),  # an accent may follow
        ("contains", "Paris", "It is London, which", False),
        ("coin_imagenet", "tench", "a tench", True),
        ("coin_imagenet", "tench", "a shark", False),
        ("coin_science_qa", "B", "A. the", True),
        ("coin_science_qa", "B", "The answer is B beca", True),
        ("coin_science_qa", "B", "The answer is B", False),
        ("vqa_accuracy", "stop sign", "The sign says stop right there", True),
        ("vqa_accuracy", "stop sign", "The stop sign", False),  # normalised away: the article
        ("captions", "", "word " * 60, False),  # 299 characters without the last space
        ("captions", "", "words " * 60, True),
    ],
)
def test_replies_that_are_settled_and_not(metric: str, answer: str, reply: str, enough: bool) -> None:
    rule = settled([document(metric, [answer])])
    assert rule is not None and rule(reply.strip()) is enough


def test_records_that_share_a_question_settle_together() -> None:
    both = settled([document("exact", ["red"]), document("exact", ["blue"])])
    assert both is not None and both("green") and not both("re") and not both("blu")
