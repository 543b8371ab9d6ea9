"""Where a reply's score is settled: whatever the model went on to say, the score would be the same.

A reply may end there. Each rule belongs to one scoring function of eval/tasks, and may say no where it could say yes,
never the other way. `tests/unit/test_settled.py` holds every scoring function to it.

Scores without a rule never settle: those that look at a whole reply (`follows`), that a later word can undo
(MLLM-DCL's, which count "Unanswerable" as wrong wherever it stands), or whose replies a judge reads (CL-VISTA's
`vista_match`).
"""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence

from mllm_keeplora.evaluation.task_files import SCORED_BY, Document, accepted_answers

# `captions.captions` reads no more.
CAPTION_CHARACTERS = 300
# Ends a reply that the model was not let finish. To the score it is one more continuation, which changes nothing.
CUT_MARK = " [...]"


def settled(documents: Sequence[Document]) -> Callable[[str], bool] | None:
    """Whether a beginning of the reply settles the score in all records that ask one question; None where none can.

    Args:
        documents: of a run's copies of test files. The function takes the beginning of a reply, white space around it
            removed.
    """
    rules = [RULES.get(str(document.get(SCORED_BY))) for document in documents]
    pairs = [(rule, document) for rule, document in zip(rules, documents, strict=True) if rule is not None]
    if not pairs or len(pairs) < len(documents):
        return None
    return lambda begun: all(rule(document, begun) for rule, document in pairs)


def _letters(text: str) -> str:
    """What equality without case leaves: equal texts have equal letters, and those of a beginning begin the whole's.

    Only so because nothing in it depends on neighbours: marks, which a text's canonical form reorders and composes,
    white space and full stops are left out, and both small sigmas are one.
    """
    characters = unicodedata.normalize("NFD", text.lower())
    return "".join(c.casefold() for c in characters if not (unicodedata.combining(c) or c.isspace() or c == "."))


def _differs(document: Document, begun: str) -> bool:
    """No answer begins like the reply any more."""
    letters = _letters(begun)
    return not any(_letters(answer).startswith(letters) for answer in accepted_answers(document))


def _contains(document: Document, begun: str) -> bool:
    """An answer is there, with an ASCII character behind it, which no accent that follows can alter."""
    if not begun or not begun[-1].isascii() or "Σ" in begun:  # whose lower case depends on what follows
        return False
    answers = [unicodedata.normalize("NFC", answer.strip().lower()) for answer in accepted_answers(document)]
    there = unicodedata.normalize("NFC", begun[:-1].lower())
    return all(answers) and any(answer in there for answer in answers)


def _contains_as_written(document: Document, begun: str) -> bool:
    return str(document["answer"]) in begun


def _names_an_option(document: Document, begun: str) -> bool:
    """`coin_science_qa` reads the reply's first letter that stands alone; that it does shows in what follows it."""
    alone = re.search(r"\b\w\b", begun)
    return len(begun) >= 3 and alone is not None and alone.end() < len(begun)


def _has_more_words(document: Document, begun: str) -> bool:
    """More words than any of the answers has, in a normal form that removes articles and splits at punctuation."""
    words = sum(re.search("[A-Za-z0-9]{4}", word) is not None for word in begun.split())
    answers = document["answers"] if isinstance(document["answers"], list) else []
    longest = max((len(str(a).split()) + sum(c in string.punctuation for c in str(a)) for a in answers), default=words)
    return words > longest


def _is_long(document: Document, begun: str) -> bool:
    return len(begun) >= CAPTION_CHARACTERS


# Name of a score -> whether the beginning of a reply settles it.
RULES: dict[str, Callable[[Document, str], bool]] = {
    "exact": _differs,
    "coin_gqa": _differs,
    "coin_ocrvqa": _differs,
    "dcl_fin": _differs,
    "contains": _contains,
    "coin_imagenet": _contains_as_written,
    "coin_science_qa": _names_an_option,
    "vqa_accuracy": _has_more_words,
    "captions": _is_long,
}
