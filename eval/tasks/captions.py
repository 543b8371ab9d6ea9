"""UCIT's score of captions: a number of the whole test set, not the mean of its captions' scores.

100 times the mean of BLEU-1 to BLEU-4, METEOR, ROUGE-L and CIDEr, by pycocoevalcap as in HiDe-LLaVA's and
MCITlib's eval_caption.py. Caption i is compared with the reference captions of image i, counted from 1:
a run writes these into its copy of the test file, so a subset of the questions is scored against the
references of that subset. METEOR and the tokenizer are Java programs.

CIDEr goes up to 10, so the score can exceed 100; published scores lie far below.
"""

import statistics
from typing import Any

from mllm_keeplora.evaluation.settled import CAPTION_CHARACTERS

Doc = dict[str, Any]
Caption = dict[str, Any]


def captions(doc: Doc, replies: list[str]) -> dict[str, Caption]:
    """The reply, cut to 300 characters, and what it is compared with; scored by `corpus_score`.

    So KeepLoRA's UCIT runner has it; HiDe-LLaVA's and MCITlib's have no cut.
    """
    return {"captions": {"caption": replies[0][:CAPTION_CHARACTERS], "references": doc["references"]}}


def captions_uncut(doc: Doc, replies: list[str]) -> dict[str, Caption]:
    """The whole reply, and what it is compared with; scored by `corpus_score`."""
    return {"captions_uncut": {"caption": replies[0], "references": doc["references"]}}


def corpus_score(items: list[Caption]) -> float:
    """100 times the mean of the seven metrics.

    Args:
        items: a caption and its references for every image.
    """
    return 100.0 * statistics.fmean(corpus_metrics(items).values())


def corpus_metrics(items: list[Caption]) -> dict[str, float]:
    """BLEU-1..4, METEOR, ROUGE-L and CIDEr of a set of captions, as fractions.

    Raises:
        RuntimeError: if the tokenizer returns another number of captions than it was given.
    """
    # Imported late: pycocoevalcap is needed where captions are scored only.
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    # In one go, because every start of the tokenizer's Java takes a second.
    tokenized = _tokenize([*(item["references"] for item in items), *([item["caption"]] for item in items)])
    truths, replies = dict(enumerate(tokenized[: len(items)])), dict(enumerate(tokenized[len(items) :]))
    bleu, _ = Bleu(4).compute_score(truths, replies, verbose=0)
    scores = dict(zip(("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4"), map(float, bleu), strict=True))
    for name, scorer in (("METEOR", Meteor()), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        scores[name] = float(scorer.compute_score(truths, replies)[0])
    return scores


def _tokenize(captions: list[list[str]]) -> list[list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    # The tokenizer takes one caption a line, and to it U+2028 and its like end a line too: every caption
    # after one would be compared with the wrong references.
    lines = {
        number: [{"caption": " ".join(caption.split())} for caption in group]
        for number, group in enumerate(captions, start=1)
    }
    tokenized: dict[int, list[str]] = PTBTokenizer().tokenize(lines)
    if {number: len(group) for number, group in tokenized.items()} != {n: len(g) for n, g in lines.items()}:
        raise RuntimeError(
            f"the PTB tokenizer returned {sum(map(len, tokenized.values()))} captions for "
            f"{sum(map(len, captions))}; is `java` a working Java?"
        )
    return [tokenized[number] for number in lines]
