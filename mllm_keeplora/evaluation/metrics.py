"""Metrics of continual learning from one accuracy matrix.

`A[j][i]` is the score on task i after stage j, 1-based in the formulas. Row 0, the untouched base, enters none
of the published formulas; it is accepted so that a caller can pass the matrix as it stands.
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

Cell = float | None
Matrix = Sequence[Sequence[Cell]]


class Estimate(NamedTuple):
    """A number and its standard error, in one unit; None where undefined."""

    value: Cell
    stderr: Cell


def summarize(matrix: Matrix) -> dict[str, float | None]:
    """Computes last, mft, maa, bwt, forgetting, transfer and average.

    | key | formula | source |
    |---|---|---|
    | last | `mean_i A[T][i]` (= MFN) | MTIL, MCITlib |
    | mft | `mean_i A[i][i]` | MCITlib |
    | maa | `mean_j mean_{i<=j} A[j][i]` | MCITlib |
    | bwt | `mean_{i<T} (A[T][i] - A[i][i])` | GEM (arXiv 1706.08840), MCITlib |
    | forgetting | `mean_{i<T} (max_{i<=j<T} A[j][i] - A[T][i])` | Chaudhry et al., arXiv 1801.10112 |
    | transfer | `mean_{i>=2} mean_{1<=j<i} A[j][i]` | ZSCL (arXiv 2303.06628), MTIL |
    | average | `mean_i mean_{j>=1} A[j][i]` | MTIL |

    Args:
        matrix: T x T rows (stage by stage), or (T+1) x T with the base row first; any unit. Cells that are
            not known may be
            None or NaN: the lower triangle suffices for the metrics that need no more.

    Returns:
        The seven metrics in the matrix's unit; None where a metric is undefined (one task has no BWT) or
        where a cell that it needs is missing. Never NaN.

    Raises:
        ValueError: rows of unequal length, or a shape that is neither T x T nor (T+1) x T.
    """
    rows = _stage_rows(matrix)
    tasks = range(len(rows))
    last = rows[-1]
    return {
        "last": _mean(last),
        "mft": _mean([rows[i][i] for i in tasks]),
        "maa": _mean([_mean(rows[j][: j + 1]) for j in tasks]),
        "bwt": _mean([_minus(last[i], rows[i][i]) for i in tasks[:-1]]),
        "forgetting": _mean([_minus(_max([rows[j][i] for j in tasks[i:-1]]), last[i]) for i in tasks[:-1]]),
        "transfer": _mean([_mean([rows[j][i] for j in range(i)]) for i in tasks[1:]]),
        "average": _mean([_mean([rows[j][i] for j in tasks]) for i in tasks]),
    }


def retention_ratios(base: Mapping[str, Cell], final: Mapping[str, Cell]) -> dict[str, float | None]:
    """Score after a stage over the base's, per general benchmark; None where undefined."""
    ratios: dict[str, float | None] = {}
    for name, value in base.items():
        before, after = _known(value), _known(final.get(name))
        ratios[name] = None if before is None or after is None or before == 0.0 else after / before
    return ratios


def mean_of_scores(scores: Sequence[Estimate]) -> Estimate:
    """Mean of n scores measured on different questions, with the error sqrt(sum_i e_i^2) / n.

    None where a score, or an error, is unknown.
    """
    mean = _mean([score.value for score in scores])
    squares = _mean([None if score.stderr is None else score.stderr**2 for score in scores])
    return Estimate(mean, None if mean is None or squares is None else math.sqrt(squares / len(scores)))


def mean_over_seeds(runs: Sequence[Estimate]) -> Estimate:
    """Mean of one quantity over repeated runs, with the error of their spread, stdev / sqrt(n).

    One run keeps its own estimate: what its questions alone say. None where a run's value is unknown.
    """
    if len(runs) == 1:
        return runs[0]
    values = [run.value for run in runs if run.value is not None]
    if not values or len(values) < len(runs):
        return Estimate(None, None)
    return Estimate(fmean(values), stdev(values) / math.sqrt(len(values)))


def _stage_rows(matrix: Matrix) -> list[list[Cell]]:
    rows = [[_known(cell) for cell in row] for row in matrix]
    tasks = len(rows[0]) if rows else 0
    if not rows or tasks == 0 or any(len(row) != tasks for row in rows) or len(rows) not in (tasks, tasks + 1):
        shape = [len(row) for row in rows]
        raise ValueError(f"expected a T x T or (T+1) x T matrix, got {len(rows)} rows of lengths {shape}")
    return rows[-tasks:]


def _known(cell: Cell) -> Cell:
    return None if cell is None or math.isnan(cell) else float(cell)


def _mean(cells: Sequence[Cell]) -> Cell:
    known = [cell for cell in cells if cell is not None]
    return fmean(known) if known and len(known) == len(cells) else None


def _max(cells: Sequence[Cell]) -> Cell:
    known = [cell for cell in cells if cell is not None]
    return max(known) if known and len(known) == len(cells) else None


def _minus(first: Cell, second: Cell) -> Cell:
    return None if first is None or second is None else first - second
