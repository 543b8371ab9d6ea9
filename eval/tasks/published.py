"""Scoring rules of published continual-learning benchmarks, each as the benchmark's own code has it.

The rules are followed where they look odd too (a substring that is no word, an empty reply that counts as
right): a score can be compared with a published one only if it was given by the same rule. Each function says
where its rule lies; sources are bjzhb666/MLLM-CL (MLLM-DCL, MLLM-ACL), zackschen/CoIN, Ghy0501/MCITlib
(CL-VISTA), yueluoshuangtian/MLLM-CTBench at 17d034b, LAMDA-CL/Prism at 7154be2 (TriGap) and
SII-HITclearlove777/PCLR at b01395c (Continual-NExT, lrp_llava_hf/eval). Replies come without surrounding white space.

Not here, because their published score needs a service: MLLM-ACL's Math (OpenAI's gpt-4o-mini reads the
answer out of the reply) and APP (replies are handed in at EvalAI). CL-VISTA's judge:
`mllm_keeplora.evaluation.judge`.
"""

import ast
import functools
import re
import string
from collections.abc import Callable
from difflib import SequenceMatcher
from pathlib import PurePath
from typing import Any

Doc = dict[str, Any]

REFUSAL = "Unanswerable"
SCI_EXACT = frozenset({"AI2D", "TQA", "VQA", "SciVerse"})
OCR_FORMULA = "Handwritten Mathematical Expression Recognition"
OCR_TYPES = frozenset(
    {
        "Regular Text Recognition",
        "Irregular Text Recognition",
        "Artistic Text Recognition",
        "Handwriting Recognition",
        "Digit String Recognition",
        "Non-Semantic Text Recognition",
        "Scene Text-centric VQA",
        "Doc-oriented VQA",
        "Key Information Extraction",
        OCR_FORMULA,
    }
)
SCIENCE_QA_OPTIONS = frozenset("ABCDE")
VISTA_EXACT = frozenset({"a", "b", "c", "d", "e", "yes", "no"})
VQA_ANSWERS = 10
MIN_IOU = 0.5
PUNCTUATION_TO_SPACES = dict.fromkeys(map(ord, string.punctuation), " ")
CTBENCH_OPTIONS = "ABCDEFGH"
CTBENCH_TOLERANCE = 1e-3  # between two numbers
CTBENCH_LONG, CTBENCH_ALIKE = 8, 0.6  # a truth of more characters may be met by a text as similar as this


def dcl_token(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-DCL, remote sensing and driving (eval_ai2d.py).

    A truth of several words has to be part of the reply. A truth of one word, its dots removed, has to be
    part of a reply without spaces, and in any other reply has to have a space before it, or a space, dot or
    comma behind it.
    """
    reply, truth = replies[0].lower(), _truth(doc).lower()
    forms: tuple[str, ...] = (truth,)
    if " " not in truth:
        word = truth.replace(".", "")
        forms = (f" {word}", f"{word} ", f"{word}.", f"{word},") if " " in reply else (word,)
    hit = any(form in reply for form in forms)
    return {"dcl_token": float(hit and not _refuses(replies))}


def dcl_med(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-DCL, medical (eval_pvqa.py): the truth is part of the reply, whatever the case."""
    hit = _truth(doc).lower() in replies[0].lower()
    return {"dcl_med": float(hit and not _refuses(replies))}


def dcl_sci(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-DCL, science (eval_sci.py): by the source that the image's file name begins with.

    AI2D, TQA, VQA and SciVerse: equality, whatever the case. All others are MapQA: to "Which states ..." the
    share of the truth's comma-separated names found among the reply's (the space behind a comma is part of a
    name), else the truth has to be part of the reply.
    """
    reply, truth = replies[0].lower(), _truth(doc).lower()
    if _refuses(replies):
        score = 0.0
    elif PurePath(doc["image"]).name.split("_")[0] in SCI_EXACT:
        score = float(reply == truth)
    elif "Which states" in doc["text"]:
        wanted, named = truth.split(","), reply.split(",")
        score = sum(name in named for name in wanted) / len(wanted)
    else:
        score = float(truth in reply)
    return {"dcl_sci": score}


def dcl_fin(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-DCL, finance (eval_finvis.py): equality, whatever the case, of the truth as it stands and the
    reply without its spaces and dots."""
    hit = replies[0].lower().replace(" ", "").replace(".", "") == _truth(doc).lower()
    return {"dcl_fin": float(hit and not _refuses(replies))}


def acl_ocr(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-ACL, OCR (eval_ocr.py, OCRBench's rule): one of the truths is part of the reply.

    In formulas case counts and spaces do not, in all other types spaces count and case does not; line breaks
    never count. The mean times 1000 is OCRBench's "Final Score" on its 1000 questions.

    Raises:
        ValueError: for an answer_type that OCRBench does not have, which its score would leave out.
    """
    kind = doc["answer_type"]
    if kind not in OCR_TYPES:
        raise ValueError(f"{_where(doc)}: answer_type is {kind!r}, expected one of {sorted(OCR_TYPES)}")
    clean = _without_blanks if kind == OCR_FORMULA else _lower_in_one_line
    reply = clean(replies[0])
    return {"acl_ocr": float(any(clean(truth) in reply for truth in _truths(doc)))}


def acl_vp(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-ACL, visual perception (eval_sat.py): the truth is part of the reply, both in lower case and
    without spaces, line breaks and dots. All types and tasks count alike."""
    truth, reply = (_without_blanks(text.lower()).replace(".", "") for text in (_truth(doc), replies[0]))
    return {"acl_vp": float(truth in reply)}


def vqa_accuracy(doc: Doc, replies: list[str]) -> dict[str, float]:
    """CoIN, TextVQA (eval_textvqa.py): agreement with ten people's answers.

    Each person in turn is left out and min(1, matching others / 3) taken, and the mean over the ten is the
    score: 0, 0.3, 0.6, 0.9 or 1 for a reply that 0, 1, 2, 3 or more people gave. Reply and answers are
    normalised as in VQA's evaluation (case, punctuation, articles, number words, contractions).

    The ten `answers` are in the record, from the test file or from TextVQA's annotations (`references`).

    Raises:
        ValueError: unless there are ten.
    """
    answers = doc["answers"]
    if not isinstance(answers, list) or len(answers) != VQA_ANSWERS:
        raise ValueError(f"{_where(doc)}: answers is {answers!r}, expected a list of {VQA_ANSWERS} texts")
    return {"vqa_accuracy": _agreement(answers, replies[0])}


def coin_gqa(doc: Doc, replies: list[str]) -> dict[str, float]:
    """CoIN, GQA (convert_gqa_for_eval.py, eval_gqa.py): the reply in lower case, without dots at its end, is
    the truth as it stands."""
    return {"coin_gqa": float(replies[0].rstrip(".").lower() == _truth(doc))}


def coin_science_qa(doc: Doc, replies: list[str]) -> dict[str, float]:
    """CoIN, ScienceQA (eval_science_qa.py): the option that the reply names is the truth.

    Named is the letter A..E that is the whole reply or begins it before ". "; else the first character that
    stands alone as a word, in upper case ("a cat" names A).

    Raises:
        ValueError: for a truth that is no letter A..E.
    """
    reply, truth = replies[0], _truth(doc)
    if truth not in SCIENCE_QA_OPTIONS:
        raise ValueError(f"{_where(doc)}: the answer is {truth!r}, expected a letter A..E")
    if reply in SCIENCE_QA_OPTIONS or (reply[:1] in SCIENCE_QA_OPTIONS and reply[1:3] == ". "):
        option = reply[0]
    else:
        alone = re.search(r"\b\w\b", reply)
        option = alone.group().upper() if alone else ""
    return {"coin_science_qa": float(option == truth)}


def coin_imagenet(doc: Doc, replies: list[str]) -> dict[str, float]:
    """CoIN, ImageNet (eval_ImagetNet.py): the truth is part of the reply or the reply of the truth, case
    counts; an empty reply is part of every truth."""
    return {"coin_imagenet": float(_truth(doc) in replies[0] or replies[0] in _truth(doc))}


def coin_grounding(doc: Doc, replies: list[str]) -> dict[str, float]:
    """CoIN, Grounding (eval_grounding.py): the reply's box and the record's `answer_bbox` overlap by an IoU
    above 0.5. A reply that is no box scores 0.

    CoIN's code takes the brackets off the reply and then its first and last character too, so that
    "[0.12, 0.3, 0.5, 0.68]" is read as .12, 0.3, 0.5, 0.6. Its published numbers hold that, so do these.
    """
    truth = _read_box(str(doc["answer_bbox"]).replace("[", "").replace("]", ""))
    if truth is None:
        raise ValueError(f"{_where(doc)}: answer_bbox is {doc['answer_bbox']!r}, expected four numbers")
    box = _read_box(replies[0].replace("[", "").replace("]", "")[1:-1])
    return {"coin_grounding": float(box is not None and _iou(box, truth) > MIN_IOU)}


def coin_ocrvqa(doc: Doc, replies: list[str]) -> dict[str, float]:
    """CoIN, OCR-VQA (eval_ocrvqa.py): equality, whatever the case."""
    hit = replies[0].lower() == _truth(doc).lower()
    return {"coin_ocrvqa": float(hit and not _refuses(replies))}


def vista_match(doc: Doc, replies: list[str]) -> dict[str, float]:
    """CL-VISTA without a judge (MCITlib's eval_video_qa_simple.py): equality for letters A..E, yes and no;
    else one of truth and reply is part of the other, whatever the case. Not the published score."""
    reply, truth = replies[0].strip().lower(), _truth(doc).strip().lower()
    hit = reply == truth if truth in VISTA_EXACT else reply in truth or truth in reply
    return {"vista_match": float(hit)}


def ctbench_choice(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-CTBench, fomc and science (reeval_clmm.py, sc_choice): the option that the reply's answer names is the one
    that the truth names.

    Named is the letter A..H that is the whole text or begins it before one of ". ) : ,", in either case and maybe
    behind a parenthesis; else the first A..H that stands alone as a word once the text is in upper case ("a cat" names
    A). Where one of the two names none, the rule is that of `ctbench_open`.
    """
    return {"ctbench_choice": float(_ctbench_same_option(_truth(doc), _ctbench_answer(replies[0])))}


def ctbench_math(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-CTBench, math (reeval_clmm.py, sc_math): by the kind of the truth.

    A letter A..H: as `ctbench_choice`. Yes or no: among the first three words of the reply's answer. All others: as
    `ctbench_number` or as `ctbench_open`.
    """
    truth, answer = _truth(doc).strip(), _ctbench_answer(replies[0])
    if re.fullmatch("[A-Ha-h]", truth):
        hit = _ctbench_same_option(truth, answer)
    elif truth.lower() in ("yes", "no"):
        hit = truth.lower() in _ctbench_words(answer).split()[:3]
    else:
        hit = _ctbench_same_number(truth, answer) or _ctbench_alike(truth, answer)
    return {"ctbench_math": float(hit)}


def ctbench_number(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-CTBench, numglue (reeval_clmm.py, sc_num): the last number of the reply's answer is the truth's last,
    up to 0.001; commas are left out, and no number is in ".5" but 5."""
    return {"ctbench_number": float(_ctbench_same_number(_truth(doc), _ctbench_answer(replies[0])))}


def ctbench_open(doc: Doc, replies: list[str]) -> dict[str, float]:
    """MLLM-CTBench, art, OCR and medical (reeval_clmm.py, sc_open): the truth is part of the reply's answer, or, where
    it has more than eight characters, similar to it by a ratio of 0.6 (difflib's).

    Both are compared in lower case, each ASCII punctuation mark a space, each run of spaces one. A truth of
    punctuation alone is never met.
    """
    return {"ctbench_open": float(_ctbench_alike(_truth(doc), _ctbench_answer(replies[0])))}


def next_textvqa(doc: Doc, replies: list[str]) -> dict[str, float]:
    """Continual-NExT, TextVQA (textvqa.py): `vqa_accuracy` over the ten answers that the record's answer lists, as
    text in Python's form: "['a', 'b', ...]".

    Raises:
        ValueError: unless it lists ten.
    """
    answers = doc["answer"]
    if isinstance(answers, str):
        try:
            answers = ast.literal_eval(answers)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # of a text that is no such list
            answers = None
    if not isinstance(answers, list) or len(answers) != VQA_ANSWERS:
        raise ValueError(f"{_where(doc)}: the answer is {doc['answer']!r}, expected a list of {VQA_ANSWERS} texts")
    return {"next_textvqa": _agreement(answers, replies[0])}


def next_grounding(doc: Doc, replies: list[str]) -> dict[str, float]:
    """Continual-NExT, Grounding (IoU.py): the first four numbers with commas between them in reply and truth are boxes
    that overlap by an IoU of 0.5 or more, once cut to 0..1. A reply without four such numbers scores 0.

    Raises:
        ValueError: for a truth without them.
    """
    truth, box = _find_box(_truth(doc)), _find_box(replies[0])
    if truth is None:
        raise ValueError(f"{_where(doc)}: the answer is {doc['answer']!r}, expected four numbers")
    return {"next_grounding": float(box is not None and _iou(box, truth) >= MIN_IOU)}


def next_blank(doc: Doc, replies: list[str]) -> dict[str, float]:
    """Continual-NExT, blanks to fill (level2.py): the truth is part of the reply. Of both the first line counts, in
    lower case and without a full stop at its end."""
    truth, reply = (text.split("\n")[0].strip().removesuffix(".").lower() for text in (_truth(doc), replies[0]))
    return {"next_blank": float(truth in reply)}


def trigap_anls(doc: Doc, replies: list[str]) -> dict[str, float]:
    """TriGap, DocVQA and InfographicVQA (eval_ucit.py, anls_single): 1 - the edit distance of reply and truth / the
    length of the longer, whatever the case; of several truths the nearest counts.

    DocVQA's own ANLS makes 0 of what is below 0.5. TriGap's does not.
    """
    return {"trigap_anls": max(_similarity(replies[0].strip(), truth.strip()) for truth in _truths(doc))}


def _truth(doc: Doc) -> str:
    if isinstance(doc["answer"], list):
        raise ValueError(f"{_where(doc)}: the answer is a list, but this rule compares with one text")
    return str(doc["answer"])


def _truths(doc: Doc) -> list[str]:
    answer = doc["answer"]
    return [str(truth) for truth in answer] if isinstance(answer, list) else [str(answer)]


def _where(doc: Doc) -> str:
    return f"question_id {doc.get('question_id')!r}"


def _refuses(replies: list[str]) -> bool:
    """MLLM-CL's and CoIN's code counts such a reply as wrong before it compares anything."""
    return REFUSAL in replies[0]


def _without_blanks(text: str) -> str:
    return text.strip().replace(" ", "").replace("\n", "")


def _lower_in_one_line(text: str) -> str:
    return text.lower().strip().replace("\n", "")


def _agreement(answers: list[Any], reply: str) -> float:
    """VQA accuracy of a reply over ten people's answers."""
    normalise = _vqa_normaliser()
    given, reply = [normalise(str(answer)) for answer in answers], normalise(reply)
    if reply not in given:
        return 0.0
    matching = given.count(reply)
    return sum(min(1.0, (matching - (answer == reply)) / 3) for answer in given) / VQA_ANSWERS


@functools.cache
def _vqa_normaliser() -> Callable[[str], str]:
    """lmms-eval's copy of the EvalAI normaliser, the one CoIN has. Imported late: lmms-eval takes seconds."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    normaliser: Callable[[str], str] = EvalAIAnswerProcessor()
    return normaliser


def _read_box(text: str) -> list[float] | None:
    try:
        box = [float(number) for number in text.split(",")]
    except ValueError:
        return None
    return box if len(box) == 4 else None


def _find_box(text: str) -> list[float] | None:
    found = re.search(",".join([r"(\d*\.?\d+)"] * 4), re.sub(r"\s+", "", text))
    return [min(1.0, float(number)) for number in found.groups()] if found else None


def _iou(first: list[float], second: list[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2) in one unit; 0 where the union is empty."""
    (left, top, right, bottom), (left2, top2, right2, bottom2) = first, second
    width, height = min(right, right2) - max(left, left2), min(bottom, bottom2) - max(top, top2)
    shared = max(0.0, width) * max(0.0, height)
    union = (right - left) * (bottom - top) + (right2 - left2) * (bottom2 - top2) - shared
    return shared / union if union > 0 else 0.0


def _ctbench_answer(reply: str) -> str:
    """What the last complete pair of answer tags holds, in either case; without one, the reply without its thoughts
    and tags. A thought that does not end goes on to the reply's end."""
    tagged = re.findall("<answer>(.*?)</answer>", reply, re.DOTALL | re.IGNORECASE)
    if tagged:
        return str(tagged[-1]).strip()
    for left_out in ("<think>.*?</think>", "<think>.*", "</?answer>"):
        reply = re.sub(left_out, " ", reply, flags=re.DOTALL | re.IGNORECASE)
    return reply.strip()


def _ctbench_words(text: str) -> str:
    return " ".join(text.lower().translate(PUNCTUATION_TO_SPACES).split())


def _ctbench_same_option(truth: str, answer: str) -> bool:
    wanted, named = _ctbench_option(truth), _ctbench_option(answer)
    return wanted == named if wanted and named else _ctbench_alike(truth, answer)


def _ctbench_option(text: str) -> str | None:
    first = re.match(rf"\(?\s*([{CTBENCH_OPTIONS}])\s*(?:[.):,]|$)", text.strip(), re.IGNORECASE)
    alone = first or re.search(rf"\b([{CTBENCH_OPTIONS}])\b", text.upper())
    return alone[1].upper() if alone else None


def _ctbench_same_number(truth: str, answer: str) -> bool:
    numbers = [re.findall(r"-?\d+\.?\d*", text.replace(",", "")) for text in (truth, answer)]
    if not all(numbers):
        return False
    wanted, given = (float(found[-1]) for found in numbers)
    return abs(wanted - given) < CTBENCH_TOLERANCE


def _ctbench_alike(truth: str, answer: str) -> bool:
    wanted, given = _ctbench_words(truth), _ctbench_words(answer)
    if not wanted:
        return False
    similar = len(wanted) > CTBENCH_LONG and SequenceMatcher(None, wanted, given).ratio() >= CTBENCH_ALIKE
    return wanted in given or similar


def _similarity(first: str, second: str) -> float:
    """1 for equal texts, 0 for texts of which nothing can stay."""
    from lmms_eval.api.metrics import levenshtein_distance  # imported late: lmms-eval takes seconds

    longer = max(len(first), len(second))  # as written: a few characters are two in lower case
    return max(0.0, 1 - levenshtein_distance(first.lower(), second.lower()) / longer) if longer else 1.0
