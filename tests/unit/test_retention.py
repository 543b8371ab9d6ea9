"""Metrics against published tables and by hand."""

import math

import pytest

from mllm_keeplora.evaluation.metrics import (
    Estimate,
    mean_of_scores,
    mean_over_seeds,
    retention_ratios,
    summarize,
)

NAN = float("nan")

# A user's LoRA-FT rerun on UCIT (Ghy0501/MCITlib#6), row = after stage.
UCIT = [
    [90.97],
    [90.38, 92.60],
    [73.90, 86.33, 59.54],
    [75.67, 68.77, 47.34, 53.30],
    [75.10, 74.53, 46.73, 52.30, 69.73],
    [65.77, 71.27, 45.05, 51.20, 49.60, 57.47],
]

# Final rows published for LLaVA-1.5-7B on MLLM-DCL: scores, MFT, MFN, BWT.
MLLM_DCL = {
    "LoRA-FT": ([69.65, 41.59, 25.43, 40.88, 87.45], 64.98, 53.00, -14.97),
    "SEFE": ([77.26, 50.37, 37.21, 40.87, 86.82], 65.01, 58.51, -8.13),
    "MR-LoRA": ([80.87, 65.32, 54.12, 56.71, 91.12], 69.64, 69.63, -0.01),
}

# The same for LLaVA-7B on Continual-NExT: scores, New.ACC, Avg.ACC, Forgetting with the sign changed.
CONTINUAL_NEXT = {
    "LoRA": (
        [53.99, 92.23, 47.23, 44.86, 4.36, 67.84, 17.16, 16.47, 47.7, 33.8, 18.04, 50.98, 69.52, 89.46, 22.27],
        *(55.91, 45.06, -11.62),
    ),
    "EWC": (
        [55.16, 91.73, 47.17, 49.3, 4.38, 82.03, 16.71, 16.88, 51.73, 35.41, 19, 50.92, 69.92, 89.51, 24.17],
        *(56.01, 46.93, -9.72),
    ),
    "MoELoRA": (
        [56, 91.36, 48.76, 48.9, 3.82, 82.19, 17.77, 16.33, 59.51, 34.17, 18.52, 49.04, 67.65, 88.28, 22.59],
        *(54.51, 46.99, -8.06),
    ),
}


def triangle(rows: list[list[float]]) -> list[list[float]]:
    return [row + [NAN] * (len(rows) - len(row)) for row in rows]


def test_published_ucit_triangle() -> None:
    metrics = summarize(triangle(UCIT))
    assert metrics["mft"] == pytest.approx(70.60, abs=0.01)
    assert metrics["last"] == pytest.approx(56.73, abs=0.01)
    assert metrics["maa"] == pytest.approx(72.90, abs=0.01)
    assert metrics["bwt"] == pytest.approx(-16.65, abs=0.01)
    assert metrics["transfer"] is None
    assert metrics["average"] is None


@pytest.mark.parametrize(
    ("final", "mft", "mfn", "bwt"),
    [*MLLM_DCL.values(), *CONTINUAL_NEXT.values()],
    ids=[*(f"DCL-{method}" for method in MLLM_DCL), *(f"NExT-{method}" for method in CONTINUAL_NEXT)],
)
def test_published_final_rows(final: list[float], mft: float, mfn: float, bwt: float) -> None:
    # Only the mean of the diagonal is published; any diagonal with that mean and the last entry gives the
    # same BWT.
    earlier = len(final) - 1
    diagonal = [((earlier + 1) * mft - final[-1]) / earlier] * earlier + [final[-1]]
    rows = [[diagonal[i] if i == j else NAN for i in range(earlier + 1)] for j in range(earlier)] + [final]
    metrics = summarize(rows)
    assert metrics["last"] == pytest.approx(mfn, abs=0.01)
    assert metrics["bwt"] == pytest.approx(bwt, abs=0.02)


def test_every_metric_by_hand() -> None:
    base = [0.9, 0.9, 0.9]
    rows = [[0.8, 0.2, 0.1], [0.6, 0.7, 0.3], [0.7, 0.5, 0.9]]
    expected = {
        "last": (0.7 + 0.5 + 0.9) / 3,
        "mft": (0.8 + 0.7 + 0.9) / 3,
        "maa": (0.8 + (0.6 + 0.7) / 2 + (0.7 + 0.5 + 0.9) / 3) / 3,
        "bwt": ((0.7 - 0.8) + (0.5 - 0.7)) / 2,
        "forgetting": ((0.8 - 0.7) + (0.7 - 0.5)) / 2,
        "transfer": (0.2 + (0.1 + 0.3) / 2) / 2,
        "average": ((0.8 + 0.6 + 0.7) + (0.2 + 0.7 + 0.5) + (0.1 + 0.3 + 0.9)) / 9,
    }
    assert summarize([base, *rows]) == pytest.approx(expected)
    assert summarize(rows) == pytest.approx(expected)


def test_forgetting_may_be_negative_when_a_task_improves_later() -> None:
    assert summarize([[0.5, 0.0], [0.7, 0.9]])["forgetting"] == pytest.approx(-0.2)


def test_one_task_has_no_past() -> None:
    metrics = summarize([[0.3], [0.8]])
    assert metrics["last"] == metrics["mft"] == metrics["maa"] == metrics["average"] == 0.8
    assert metrics["bwt"] is metrics["forgetting"] is metrics["transfer"] is None


@pytest.mark.parametrize("missing", [None, NAN])
def test_a_missing_cell_makes_null_never_nan(missing: float | None) -> None:
    metrics = summarize([[0.5, missing], [missing, 0.9]])
    assert metrics["last"] is None
    assert metrics["mft"] == pytest.approx(0.7)
    assert all(value is None or not math.isnan(value) for value in metrics.values())


@pytest.mark.parametrize("shape", [[], [[]], [[0.1, 0.2]], [[0.1], [0.2, 0.3]], [[0.1]] * 3])
def test_other_shapes_are_refused(shape: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="T x T"):
        summarize(shape)


def test_retention_is_a_ratio_to_the_base() -> None:
    ratios = retention_ratios({"a": 0.8, "b": 0.0, "c": 0.5}, {"a": 0.6, "b": 0.3, "c": None})
    assert ratios == {"a": pytest.approx(0.75), "b": None, "c": None}


def test_error_of_a_mean_of_scores_is_that_of_independent_sums() -> None:
    errors = [0.03, 0.04, 0.12]
    mean = mean_of_scores([Estimate(value, error) for value, error in zip([0.2, 0.4, 0.9], errors, strict=True)])
    assert mean == pytest.approx((0.5, 0.13 / 3))  # 0.03^2 + 0.04^2 + 0.12^2 = 0.13^2
    assert mean_of_scores([Estimate(0.2, None), Estimate(0.4, 0.1)]) == pytest.approx((0.3, None))
    assert mean_of_scores([Estimate(None, 0.1), Estimate(0.4, 0.1)]) == Estimate(None, None)
    assert mean_of_scores([]) == Estimate(None, None)


def test_seeds_count_by_their_spread() -> None:
    runs = [Estimate(value, 9.0) for value in (0.1, 0.2, 0.3, 0.4)]
    assert mean_over_seeds(runs) == pytest.approx((0.25, math.sqrt(0.05 / 3) / 2))
    assert mean_over_seeds(runs[:1]) == runs[0]
    assert mean_over_seeds([*runs, Estimate(None, None)]) == Estimate(None, None)
