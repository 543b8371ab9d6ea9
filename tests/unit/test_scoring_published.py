"""The published benchmarks' scoring rules, on cases worked out from the text of each rule.

Every table has a positive, a negative and a boundary case, an empty reply, and what is peculiar to the rule.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm_keeplora.data.stream import GeneralSpec, Stream, StreamError, TaskSpec, data_hash, load_stream
from mllm_keeplora.evaluation.errors import EvaluationError
from mllm_keeplora.evaluation.task_files import TEMPLATES, read_index, scored_tasks, write_task_files
from tests.conversations import read_copy
from tests.unit.test_scoring import load_module

rules = load_module(TEMPLATES / "published.py")
captions = load_module(TEMPLATES / "captions.py")


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        # a truth of several words: part of the reply, dots kept
        ("They are Going Ahead now", "going ahead", 1),
        ("going  ahead", "going ahead", 0),
        ("go st. now", "st. now", 1),
        ("go st now", "st. now", 0),
        # a truth of one word, a reply of several
        ("it is red", "Red", 1),
        ("red it is", "red", 1),
        ("colours:red. yes", "red.", 1),
        ("colours:red, yes", "red", 1),
        ("colours:red; yes", "red", 0),
        ("it is redder", "red", 1),  # a space before it is enough
        ("it is bored", "red", 0),
        ("1, 2", "2", 1),
        # both of one word: part of the reply
        ("bored", "red", 1),
        ("Red", "red.", 1),
        ("r.ed", "red", 0),
        ("", "red", 0),
        # refusals
        ("Unanswerable, red", "red", 0),
        ("unanswerable, red", "red", 1),  # the check is one of case
        ("grün ÄPFEL", "äpfel", 1),
    ],
)
def test_dcl_token(reply: str, answer: str, score: int) -> None:
    assert rules.dcl_token({"answer": answer}, [reply]) == {"dcl_token": score}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("This is a Lymph node.", "lymph Node", 1),
        ("lymph", "lymph node", 0),
        ("no", "no", 1),
        ("cannot say", "no", 1),  # a substring need not be a word
        ("", "no", 0),
        ("Unanswerable: no", "no", 0),
    ],
)
def test_dcl_med(reply: str, answer: str, score: int) -> None:
    assert rules.dcl_med({"answer": answer}, [reply]) == {"dcl_med": score}


@pytest.mark.parametrize(
    ("image", "question", "reply", "answer", "score"),
    [
        ("images/AI2D_12.png", "Which states of matter?", "Solid", "solid", 1),
        ("images/TQA_1_2.png", "q", "solid.", "solid", 0),
        ("VQA_1.png", "q", "", "solid", 0),
        ("SciVerse_1.png", "q", "A", "a", 1),
        # a name that only begins like a source, and a source in a folder's name, are MapQA
        ("images/AI2Dx_12.png", "q", "it is solid", "solid", 1),
        ("AI2D_images/1.png", "q", "it is solid", "solid", 1),
        ("images/map_1.jpg", "What is the value?", "about 12-20 here", "12-20", 1),
        ("images/map_1.jpg", "What is the value?", "12", "12-20", 0),
        ("images/map_1.jpg", "Which states are blue?", "Texas,Utah", "Utah,Texas", 1),
        ("images/map_1.jpg", "Which states are blue?", "Texas,Ohio,Iowa", "Texas,Utah,Iowa,Maine", 0.5),
        ("images/map_1.jpg", "Which states are blue?", "Texas, Utah", "Texas,Utah", 0.5),
        ("images/map_1.jpg", "Which states are blue?", "Texas, Utah", "Texas, Utah", 1),
        ("images/map_1.jpg", "Which states are blue?", "", "Texas", 0),
        (
            "images/map_1.jpg",
            "which states are blue?",
            "Texas and Utah",
            "texas",
            1,
        ),  # "Which" is one of case
        ("images/map_1.jpg", "Which states are blue?", "Unanswerable,Texas", "Texas", 0),
    ],
)
def test_dcl_sci(image: str, question: str, reply: str, answer: str, score: float) -> None:
    doc = {"image": image, "text": question, "answer": answer}
    assert rules.dcl_sci(doc, [reply]) == {"dcl_sci": score}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("Yes.", "Yes", 1),
        (" B .", "b", 1),
        ("Yes, it is", "Yes", 0),
        ("A", "A.", 0),  # the truth is not cleaned
        ("", "No", 0),
        ("Unanswerable", "unanswerable", 0),
    ],
)
def test_dcl_fin(reply: str, answer: str, score: int) -> None:
    assert rules.dcl_fin({"answer": answer}, [reply]) == {"dcl_fin": score}


FORMULA = "Handwritten Mathematical Expression Recognition"


@pytest.mark.parametrize(
    ("kind", "reply", "answer", "score"),
    [
        ("Regular Text Recognition", "The word is CENTRE.", "centre", 1),
        ("Regular Text Recognition", "cent re", "centre", 0),
        ("Doc-oriented VQA", "cent\nre", "centre", 1),  # line breaks vanish, without a space
        ("Scene Text-centric VQA", "north", ["south", "North"], 1),
        ("Scene Text-centric VQA", "east", ["south", "North"], 0),
        ("Key Information Extraction", "", "x", 0),
        (FORMULA, r"$ \frac{ a }{ b } $", r"\frac {a} {b}", 1),
        (FORMULA, r"\frac{A}{b}", r"\frac{a}{b}", 0),
        (FORMULA, "x\n+ 1", "x+1", 1),
    ],
)
def test_acl_ocr(kind: str, reply: str, answer: str | list[str], score: int) -> None:
    assert rules.acl_ocr({"answer_type": kind, "answer": answer}, [reply]) == {"acl_ocr": score}


def test_acl_ocr_refuses_types_that_its_score_leaves_out() -> None:
    doc = {"question_id": 3, "answer_type": FORMULA, "answer": "x"}
    with pytest.raises(ValueError, match="question_id 3: answer_type is 'Poetry'.*Doc-oriented VQA"):
        rules.acl_ocr({**doc, "answer_type": "Poetry"}, ["z"])


@pytest.mark.parametrize("rule", [rules.dcl_med, rules.acl_vp, rules.coin_gqa, rules.ctbench_open])
def test_rules_of_one_answer_refuse_a_list(rule: Any) -> None:
    with pytest.raises(ValueError, match="question_id 4: the answer is a list"):
        rule({"question_id": 4, "answer": ["a", "b"]}, ["a"])


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("(B) The chair.", "the chair", 1),
        ("T h e\nchair", "The chair.", 1),
        ("the table", "the chair", 0),
        ("12", "2", 1),
        ("", "2", 0),
    ],
)
def test_acl_vp(reply: str, answer: str, score: int) -> None:
    doc = {"answer": answer, "type": "2D", "task": "Count"}
    assert rules.acl_vp(doc, [reply]) == {"acl_vp": score}


@pytest.mark.parametrize(("matching", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_the_mean_over_ten_people_left_out(matching: int, score: float) -> None:
    answers = ["Stop"] * matching + [f"other {number}" for number in range(10 - matching)]
    found = rules.vqa_accuracy({"answers": answers}, ["stop"])
    assert found == {"vqa_accuracy": pytest.approx(score)}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("The Dog.", "dog", 1),
        ("two", "2", 1),
        ("dont walk", "don't walk", 1),
        ("1,000", "1000", 1),
        ("3.5", "35", 0),  # a dot between digits stays
        ("stop sign", "stop", 0),
        ("", "stop", 0),
        ("CAFÉ", "café", 1),
    ],
)
def test_vqa_accuracy_normalises_reply_and_answers(reply: str, answer: str, score: int) -> None:
    assert rules.vqa_accuracy({"answers": [answer] * 10}, [reply]) == {"vqa_accuracy": score}


@pytest.mark.parametrize("answers", [["a"] * 9, "a", None])
def test_vqa_accuracy_needs_ten_answers(answers: Any) -> None:
    with pytest.raises(ValueError, match="question_id 5: answers is .*expected a list of 10"):
        rules.vqa_accuracy({"question_id": 5, "answers": answers}, ["a"])


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [("Left.", "left", 1), ("left..", "left", 1), ("le.ft", "left", 0), ("left", "Left", 0), ("", "left", 0)],
)
def test_coin_gqa(reply: str, answer: str, score: int) -> None:
    assert rules.coin_gqa({"answer": answer}, [reply]) == {"coin_gqa": score}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("B", "B", 1),
        ("B. a magnet", "B", 1),
        ("B.", "B", 1),  # too short for the second form; the letter stands alone
        ("b", "B", 1),
        ("The answer is C.", "C", 1),
        ("A magnet is B", "B", 0),  # the first character that stands alone counts
        ("a magnet, so B", "A", 1),
        ("1 of them: B", "B", 0),
        ("magnet", "B", 0),
        ("F", "A", 0),
        ("", "A", 0),
    ],
)
def test_coin_science_qa(reply: str, answer: str, score: int) -> None:
    assert rules.coin_science_qa({"answer": answer}, [reply]) == {"coin_science_qa": score}


def test_coin_science_qa_needs_a_letter() -> None:
    with pytest.raises(ValueError, match="question_id 'q': the answer is 'magnet'.*A..E"):
        rules.coin_science_qa({"question_id": "q", "answer": "magnet"}, ["A"])


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("a tabby cat", "tabby", 1),
        ("tabby", "tabby cat", 1),
        ("Tabby", "tabby", 0),
        ("dog", "tabby", 0),
        ("", "tabby", 1),  # as published
    ],
)
def test_coin_imagenet(reply: str, answer: str, score: int) -> None:
    assert rules.coin_imagenet({"answer": answer}, [reply]) == {"coin_imagenet": score}


@pytest.mark.parametrize(
    ("reply", "box", "score"),
    [
        ("[0.10, 0.20, 0.50, 0.60]", "[0.10, 0.20, 0.50, 0.60]", 1),
        # three of four quarters of a unit square: IoU 0.75
        ("[0.00, 0.00, 1.00, 0.750]", "[0, 0, 1, 1]", 1),
        # exactly one half is not above one half
        ("[0.00, 0.00, 1.00, 0.500]", "[0, 0, 1, 1]", 0),
        ("[0.00, 0.00, 1.00, 0.510]", "[0, 0, 1, 1]", 1),
        # the last digit is cut off: 0.51 is read as 0.5
        ("[0.00, 0.00, 1.00, 0.51]", "[0, 0, 1, 1]", 0),
        # and the first one: 1.5 is read as .5
        ("[1.50, 0.00, 2.00, 1.000]", "[1.5, 0, 2, 1]", 0),
        ("[0.60, 0.60, 0.90, 0.90]", "[0.1, 0.1, 0.4, 0.4]", 0),
        ("[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.3, 0.4]", 0),
        ("in the middle", "[0.1, 0.2, 0.3, 0.4]", 0),
        ("[0.nan, nan, nan, nan0]", "[0.1, 0.2, 0.3, 0.4]", 0),
        ("", "[0.1, 0.2, 0.3, 0.4]", 0),
    ],
)
def test_coin_grounding(reply: str, box: str, score: int) -> None:
    assert rules.coin_grounding({"answer_bbox": box}, [reply]) == {"coin_grounding": score}


def test_coin_grounding_needs_a_box() -> None:
    with pytest.raises(ValueError, match=r"question_id 1: answer_bbox is '\[1, 2\]'.*four numbers"):
        rules.coin_grounding({"question_id": 1, "answer_bbox": "[1, 2]"}, ["[0.1, 0.2, 0.3, 0.4]"])


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("Jane Doe", "jane doe", 1),
        ("Jane Doe.", "Jane Doe", 0),
        ("", "Jane", 0),
        ("Unanswerable", "Unanswerable", 0),
    ],
)
def test_coin_ocrvqa(reply: str, answer: str, score: int) -> None:
    assert rules.coin_ocrvqa({"answer": answer}, [reply]) == {"coin_ocrvqa": score}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("a", "A", 1),
        ("A.", "a", 0),
        ("yes, it does", "Yes", 0),
        ("three cars", "Three", 1),
        ("three", "three cars", 1),
        ("four", "three", 0),
        ("", "three cars", 1),  # as published
        ("", "yes", 0),
    ],
)
def test_vista_match(reply: str, answer: str, score: int) -> None:
    assert rules.vista_match({"answer": answer}, [reply]) == {"vista_match": score}


# Every case of MLLM-CTBench, TriGap and Continual-NExT was put to the published function too, at the commits that the
# module names.
TAGGED = [
    # what the last complete pair of tags holds
    ("<think> b </think> <answer>red</answer>", "red", 1),
    ("<ANSWER> red\n</Answer>", "red", 1),
    ("<answer>blue</answer> no, <answer>red</answer>", "red", 1),
    ("<answer>red</answer> no, <answer>blue</answer>", "red", 0),
    ("red <answer>blue</answer> red", "red", 0),
    ("red <answer></answer>", "red", 0),  # an empty pair is a pair
    ("<answer>blue <answer>red</answer></answer>", "red", 1),  # nested: up to the first end
    ("<answer>blue</answer> <answer>red", "red", 0),  # the last does not end
    ("<answer>red <answer>blue</answer>", "red", 1),
    ("< answer>blue</answer> red", "red", 1),  # no tag, so all of it
    # no pair: the reply without its thoughts and tags
    ("red", "red", 1),
    ("<think>red</think> blue", "red", 0),
    ("<think>blue</think> red", "red", 1),
    ("<answer>red", "red", 1),
    ("red</answer>", "red", 1),
    ("<think>blue <answer>red", "red", 0),  # a thought without an end goes on to the end
    ("red <think>blue", "red", 1),
    ("<THINK>red</THINK><Think>red", "red", 0),
    ("red</think>", "red", 1),
    ("<think>blue</think> re<answer>d", "red", 0),  # a tag becomes a space
    ("", "red", 0),
]


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        *TAGGED,
        # lower case, punctuation and runs of spaces are one space
        ("It is RED.", "red", 1),
        ("bored", "red", 1),  # part of a word
        ("a  dark-red\thouse", "Dark red house!", 1),
        ("darkred", "dark red", 0),
        ("anything", "...", 0),
        # more than eight characters may be similar: ratios of 0.5, 0.6 and 0.6, then 5 / 8
        ("abcdefxxxxxx", "abcdefyyyyyy", 0),
        ("abcdefghixxxxxx", "abcdefghiyyyyyy", 1),
        ("abcdefxxxx", "abcdefyyyy", 1),
        ("abcdexxx", "abcdeyyy", 0),  # eight
        ("<answer>abcdefxxxx</answer>", "abcdefyyyy", 1),
        ("éclair", "Éclair", 1),
    ],
)
def test_ctbench_open(reply: str, answer: str, score: int) -> None:
    assert rules.ctbench_open({"answer": answer}, [reply]) == {"ctbench_open": score}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("<think>A or C?</think><answer>C</answer>", "C", 1),
        ("<think>C</think><answer>A</answer>", "C", 0),
        ("(c) neutral", "C", 1),
        (" ( b ), not a", "B", 1),
        ("c: neutral", "C", 1),
        ("c neutral", "C", 1),
        ("The answer is C.", "C", 1),
        ("a cat, so C", "C", 0),  # names A
        ("AC", "C", 1),  # names none: as text, of which the truth is part
        ("I", "I", 1),
        ("neutral", "C", 0),
        ("It is neutral", "neutral", 1),
        ("B", "b. dovish", 1),
        ("dovish", "B. dovish", 0),
        ("B", "Option B", 1),
        ("", "C", 0),
    ],
)
def test_ctbench_choice(reply: str, answer: str, score: int) -> None:
    assert rules.ctbench_choice({"answer": answer}, [reply]) == {"ctbench_choice": score}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("<think>5</think><answer>It is 12.</answer>", "12", 1),
        ("12, not 13", "12", 0),  # the last number counts
        ("1,200", "1200", 1),
        ("12.0009", "12", 1),
        ("12.0011", "12", 0),
        ("-12", "12", 0),
        ("3-12", "-12", 1),
        (".5", "5", 1),
        ("0.5", ".5", 0),
        ("7", "step 1 of 7", 1),
        ("twelve", "12", 0),
        ("12", "twelve", 0),
        ("", "12", 0),
    ],
)
def test_ctbench_number(reply: str, answer: str, score: int) -> None:
    assert rules.ctbench_number({"answer": answer}, [reply]) == {"ctbench_number": score}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        # a letter
        ("<answer>(b)</answer>", "b", 1),
        ("It is 3", "B", 0),
        # yes or no: among three words
        ("well, I say YES", "yes", 0),
        ("I say, YES!", "yes", 1),
        ("<think>yes</think> no", "Yes", 0),
        ("yesterday", "yes", 0),
        # a number, or a text
        ("145.0", "145°", 1),
        ("It is 145° in all", "145°", 1),
        ("the ratio is 2:3", "2:3", 1),
        ("4:3", "2:3", 1),  # by the last number
        ("x = 4", "2:3", 0),
        ("an isosceles triangle", "isosceles", 1),
        ("I", "I", 1),
        ("", "12", 0),
    ],
)
def test_ctbench_math(reply: str, answer: str, score: int) -> None:
    assert rules.ctbench_math({"answer": answer}, [reply]) == {"ctbench_math": score}


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("Acme Corp", "acme corp", 1),
        ("Acme Corp.", ["acme corp"], 0.9),
        ("kitten", "sitting", 1 - 3 / 7),
        ("sitting", ["kitten", "fitting"], 1 - 1 / 7),
        ("abcd", "abxy", 0.5),
        ("abcd", "axyz", 0.25),  # below DocVQA's threshold
        ("abcd", "wxyz", 0),
        ("  12  ", " 12", 1),
        ("İ", "x", 0),  # two characters in lower case, but not below 0
        ("", "12", 0),
    ],
)
def test_trigap_anls(reply: str, answer: str | list[str], score: float) -> None:
    assert rules.trigap_anls({"answer": answer}, [reply]) == pytest.approx({"trigap_anls": score})


def test_next_textvqa_is_vqa_accuracy_over_a_list_in_text() -> None:
    answers = ["red"] * 2 + ["blue"] * 8
    for reply in ("red", "blue", "Blue.", "green", ""):
        score = rules.vqa_accuracy({"answers": answers}, [reply])["vqa_accuracy"]
        for answer in (str(answers), answers):
            assert rules.next_textvqa({"answer": answer}, [reply]) == {"next_textvqa": score}


@pytest.mark.parametrize("answer", ["red", "['red']", "red, blue", "(" * 9, "", ["red"] * 9, str(tuple("abcdefghij"))])
def test_next_textvqa_needs_ten_answers(answer: str) -> None:
    with pytest.raises(ValueError, match="question_id 1: the answer is .* a list of 10 texts"):
        rules.next_textvqa({"question_id": 1, "answer": answer}, ["red"])


@pytest.mark.parametrize(
    ("reply", "box", "score"),
    [
        ("[0.1,0.2,0.5,0.6]", "[0.1, 0.2, 0.5, 0.6]", 1),
        ("It is at 0.1, 0.2, 0.5, 0.6.", "[0.1,0.2,0.5,0.6]", 1),
        ("[0, 0, 1, 0.5]", "[0, 0, 1, 1]", 1),  # an IoU of 0.5
        ("[0, 0, 1, 0.49]", "[0, 0, 1, 1]", 0),
        ("[0, 0, 7, 1]", "[0, 0, 1, 1]", 1),  # cut to 1
        ("[0.1 0.2 0.5 0.6]", "[0.1,0.2,0.5,0.6]", 0),  # no commas
        ("[0.1,0.2,0.5]", "[0.1,0.2,0.5,0.6]", 0),
        ("[9,9,9,9] no, [0.1,0.2,0.5,0.6]", "[0.1,0.2,0.5,0.6]", 0),  # the first counts
        ("[0.6,0.6,0.6,0.6]", "[0.6,0.6,0.6,0.6]", 0),  # empty boxes
        ("", "[0.1,0.2,0.5,0.6]", 0),
    ],
)
def test_next_grounding(reply: str, box: str, score: int) -> None:
    assert rules.next_grounding({"answer": box}, [reply]) == {"next_grounding": score}


def test_next_grounding_needs_a_box() -> None:
    with pytest.raises(ValueError, match=r"question_id 1: the answer is '\[1, 2\]'.*four numbers"):
        rules.next_grounding({"question_id": 1, "answer": "[1, 2]"}, ["[0.1, 0.2, 0.3, 0.4]"])


@pytest.mark.parametrize(
    ("reply", "answer", "score"),
    [
        ("A dog.", "dog", 1),
        ("dog", "Dog.", 1),
        ("a cat\na dog", "dog", 0),  # the first line alone
        ("dog", "dog\nor cat", 1),
        ("hotdogs", "dog", 1),
        ("dog..", "dog.", 1),
        ("dog", "a dog", 0),
        ("", ".", 1),  # nothing is left of the truth
        ("", "dog", 0),
    ],
)
def test_next_blank(reply: str, answer: str, score: int) -> None:
    assert rules.next_blank({"answer": answer}, [reply]) == {"next_blank": score}


def test_captions_are_cut_at_300_characters_unless_asked_not_to() -> None:
    doc = {"references": ["a cat"]}
    for length, kept in ((299, 299), (300, 300), (301, 300)):
        reply = "é" * length
        assert len(captions.captions(doc, [reply])["captions"]["caption"]) == kept
        assert captions.captions_uncut(doc, [reply])["captions_uncut"]["caption"] == reply


def write_captions_stream(root: Path, *, metric: str = "captions", **annotations: Any) -> Stream:
    """Three questions about images, and a references file that numbers them 1..3, not in order."""
    root.mkdir(parents=True, exist_ok=True)
    records = [{"question_id": f"q{n}", "image": f"{n}.png", "text": "What is shown?", "answer": "a"} for n in "xyz"]
    (root / "test.json").write_text(json.dumps(records))
    coco = [{"image_id": n, "caption": f"{n}{m}"} for m in "ab" for n in (3, 1, 2)]
    (root / "coco.json").write_text(json.dumps({"images": [], "annotations": coco, **annotations}))
    task = TaskSpec("flickr", "test.json", "test.json", metric, references="coco.json")
    return Stream("ucit", root, (task,))


def test_captions_task_carries_its_references_and_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_java(tmp_path, monkeypatch, status=0)
    stream = write_captions_stream(tmp_path / "data")
    write_task_files(stream, tmp_path / "tasks")
    records = read_copy(yaml.safe_load((tmp_path / "tasks/keeplora_ucit_flickr.yaml").read_text()))
    assert [record["references"] for record in records] == [["1a", "1b"], ["2a", "2b"], ["3a", "3b"]]
    assert [record["question_id"] for record in records] == ["qx", "qy", "qz"]
    _, (entry,) = read_index(tmp_path / "tasks")
    assert entry == scored_tasks(stream)[0] and entry.native_max == 100.0


def use_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None) -> None:
    """A PATH with a `java` that exits with the status, or with none."""
    folder = tmp_path / "bin"
    folder.mkdir()
    if status is not None:
        (folder / "java").write_text(f"#!/bin/sh\nexit {status}\n")
        (folder / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))


@pytest.mark.parametrize("status", [None, 1], ids=["no java", "a java that does not run"])
def test_captions_are_refused_before_anything_where_java_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None
) -> None:
    use_java(tmp_path, monkeypatch, status)
    with pytest.raises(EvaluationError, match="flickr: METEOR.*`java -version`.*install Java"):
        write_task_files(write_captions_stream(tmp_path / "data"), tmp_path / "tasks")
    # Other metrics need none.
    plain = Stream("s", tmp_path / "data", (TaskSpec("t", "test.json", "test.json", "exact"),))
    assert write_task_files(plain, tmp_path / "plain") == ["keeplora_s_t"]


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ([{"image_id": n, "caption": "a"} for n in (1, 2)], r"3 records.*not of \[3\], but of \[\]"),
        ([{"image_id": n, "caption": "a"} for n in (0, 1, 2)], r"not of \[3\], but of \[0\]"),
        ([{"image": 1, "caption": "a"}], "no COCO captions file.*KeyError: 'image_id'"),
        (None, "no COCO captions file.*TypeError"),
    ],
)
def test_references_have_to_fit_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, annotations: Any, message: str
) -> None:
    use_java(tmp_path, monkeypatch, status=0)
    stream = write_captions_stream(tmp_path / "data", annotations=annotations)
    with pytest.raises(EvaluationError, match=message):
        write_task_files(stream, tmp_path / "tasks")


def test_references_go_with_metrics_that_read_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_java(tmp_path, monkeypatch, status=0)
    with pytest.raises(EvaluationError, match="'exact' reads no reference captions; leave 'references' out"):
        write_task_files(write_captions_stream(tmp_path / "data", metric="exact"), tmp_path / "tasks")
    bare = Stream("s", tmp_path / "data", (TaskSpec("t", "test.json", "test.json", "captions"),))
    with pytest.raises(EvaluationError, match="t: metric 'captions' compares.*give their COCO file"):
        write_task_files(bare, tmp_path / "tasks")


def test_ten_answers_come_from_the_records_or_from_textvqas_annotations(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_captions_stream(root)
    task = TaskSpec("text", "test.json", "test.json", "vqa_accuracy", references="textvqa.json")
    with pytest.raises(EvaluationError, match="text: metric 'vqa_accuracy' reads answers.*row 1"):
        bare = TaskSpec("text", "test.json", "test.json", "vqa_accuracy")
        write_task_files(Stream("coin", root, (bare,)), tmp_path / "tasks")

    data = [{"question_id": f"q{n}", "answers": [n] * 10, "image_id": n} for n in "zyx"]
    (root / "textvqa.json").write_text(json.dumps({"data": data}))
    write_task_files(Stream("coin", root, (task,)), tmp_path / "tasks")
    records = read_copy(yaml.safe_load((tmp_path / "tasks/keeplora_coin_text.yaml").read_text()))
    assert [record["answers"] for record in records] == [["x"] * 10, ["y"] * 10, ["z"] * 10]

    (root / "textvqa.json").write_text(json.dumps({"data": data[:2]}))
    with pytest.raises(EvaluationError, match="no answers to 1 of the 3 questions.*question_id qx"):
        write_task_files(Stream("coin", root, (task,)), tmp_path / "tasks")


@pytest.mark.parametrize(
    "written",
    [
        {"answer": [{"type": "text", "text": "two"}]},
        {"text": [{"type": "text", "text": "Which states?"}]},
        {"text": [{"type": "image"}, {"type": "text", "text": "Which states?"}]},
        {"image": ["MapQA_1.png"]},
        {"image": {"path": "MapQA_1.png", "bytes": None}},
        {"image": None, "images": ["MapQA_1.png"]},
        {},
    ],
    ids=str,
)
def test_rules_are_given_texts_however_a_test_record_writes_them(written: dict[str, Any], tmp_path: Path) -> None:
    record = {"question_id": 1, "image": "MapQA_1.png", "text": "Which states?", "answer": "two", **written}
    (tmp_path / "t.json").write_text(json.dumps([record]))
    (tmp_path / "MapQA_1.png").touch()
    stream = Stream("s", tmp_path, (TaskSpec("t", train="t.json", test="t.json", metric="dcl_sci"),))
    [name] = write_task_files(stream, tmp_path / "tasks")
    [doc] = read_copy(yaml.safe_load((tmp_path / f"tasks/{name}.yaml").read_text()))
    assert (doc["text"], doc["answer"], Path(doc["image"]).name) == ("Which states?", "two", "MapQA_1.png")
    assert rules.dcl_sci(doc, ["two, one"]) == {"dcl_sci": 1}


def test_record_keys_that_a_rule_reads_are_checked_before_anything(tmp_path: Path) -> None:
    stream = write_captions_stream(tmp_path / "data")
    ocr = Stream("s", stream.data_root, (TaskSpec("ocr", "test.json", "test.json", "acl_ocr"),))
    with pytest.raises(EvaluationError, match="ocr: metric 'acl_ocr' reads answer_type.*row 1 of .*test.json"):
        write_task_files(ocr, tmp_path / "tasks")


def test_references_are_files_of_the_stream(tmp_path: Path) -> None:
    stream = write_captions_stream(tmp_path / "data")
    document = {
        "name": "ucit",
        "data_root": str(tmp_path / "data"),
        "tasks": [
            {
                "name": "flickr",
                "train": "test.json",
                "test": "test.json",
                "metric": "captions",
                "references": "coco.json",
            }
        ],
    }
    path = tmp_path / "stream.yaml"
    path.write_text(json.dumps(document))
    assert load_stream(path) == stream

    (task,) = stream.tasks
    before = data_hash(stream, task)
    (tmp_path / "data" / "coco.json").write_text('{"annotations": []}')
    assert data_hash(stream, task) != before
    (tmp_path / "data" / "coco.json").unlink()
    with pytest.raises(StreamError, match="not found.*coco.json"):
        load_stream(path)


@pytest.mark.parametrize(
    ("references", "message"), [("../coco.json", "leaves the data root"), ("coco.csv", "ending in .json")]
)
def test_references_outside_the_data_root_or_of_another_kind_are_refused(references: str, message: str) -> None:
    with pytest.raises(StreamError, match=f"'t': references is .*{message}"):
        TaskSpec("t", "a.json", "a.json", "captions", references=references)
    with pytest.raises(StreamError, match="'t': references is .*"):
        GeneralSpec("t", test="a.json", metric="captions", references=references)


def test_references_of_a_stock_benchmark_are_refused() -> None:
    with pytest.raises(StreamError, match="found references"):
        GeneralSpec("p", lmms_eval_task="pope", score="x", native_max=1.0, references="coco.json")
