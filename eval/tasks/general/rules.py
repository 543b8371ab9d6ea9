"""Stock lmms-eval tasks without the outside judge that they would ask."""

from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.tasks.mmvu import utils as mmvu


def mmvu_doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    """The clip, as lmms-eval's mmvu_val shows it."""
    return list(mmvu.mmvu_doc_to_visual_val(doc))


def mmvu_doc_to_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, Any]) -> str:
    """The question, as lmms-eval's mmvu_val asks it."""
    return str(mmvu.mmvu_doc_to_text(doc, lmms_eval_specific_kwargs))


def mmvu_process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """One answer's score by mmvu_val's rules, where that would go on to ask a judge about open answers."""
    correct = mmvu.evaluate_with_rule_based(doc, str(results[0]))
    category = mmvu.extract_category(doc)
    return {"accuracy": {"category": category, "correct": int(correct), "score": int(correct)}}


def mmvu_aggregate(results: Sequence[Mapping[str, Any]]) -> float:
    """Accuracy over all questions, in percent, as lmms-eval's mmvu_val aggregates."""
    return float(mmvu.mmvu_aggregate_results_val(results))
