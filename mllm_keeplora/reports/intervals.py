"""95 % intervals of scores: a score of 100 % on 200 questions is not known to be 100 % of all questions.

Scores are fractions. What is undefined is None.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mllm_keeplora.evaluation.metrics import Cell, Estimate, mean_of_scores

Z = 1.959964  # of 95 %, two-sided


class Interval(NamedTuple):
    """A number, and the limits between which it lies; None where undefined."""

    value: Cell
    low: Cell
    high: Cell


def around(estimate: Estimate) -> Interval:
    """A number plus and minus its standard error."""
    value, error = estimate
    if value is None or error is None:
        return Interval(value, None, None)
    return Interval(value, value - error, value + error)


def interval_of(score: Mapping[str, Any]) -> Interval:
    """The 95 % interval of a score (`evaluation.score.Score`).

    Wilson's (1927) where each question is right or wrong, and where all questions have one score: 1.96 standard errors
    would be nothing there. The mean and 1.96 standard errors where questions score in between. Undefined where the
    score is no mean over questions.
    """
    value, error, n = score["value"], score["stderr"], score["n"]
    if error is None or value is None:
        return Interval(value, None, None)
    if 0 <= value <= 1:  # captions score above
        binary = math.sqrt(value * (1 - value) / max(n - 1, 1))
        if error == 0 or math.isclose(error, binary, rel_tol=1e-3):
            return wilson(value, n)
    return Interval(value, value - Z * error, value + Z * error)


def wilson(share: float, n: int) -> Interval:
    """Wilson's score interval of a share of n questions, not corrected for continuity."""
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return Interval(share, min(share, centre - half), max(share, centre + half))


def mean_of_intervals(intervals: Sequence[Interval]) -> Interval:
    """The mean of scores on different questions, by recovering variances from the limits (Zou and Donner 2008)."""
    mean = mean_of_scores([Estimate(value, None) for value, _, _ in intervals]).value
    limits = [(value, low, high) for value, low, high in intervals if None not in (value, low, high)]
    if mean is None or len(limits) < len(intervals):
        return Interval(mean, None, None)
    below = math.hypot(*(value - low for value, low, _ in limits)) / len(limits)  # type: ignore[operator]
    above = math.hypot(*(high - value for value, _, high in limits)) / len(limits)  # type: ignore[operator]
    return Interval(mean, mean - below, mean + above)
