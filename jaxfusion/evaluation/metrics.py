"""Accuracy and its interval."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5% quantile


def wilson_interval(correct: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson, 1927), both ends as fractions."""
    rate, shrink = correct / n, 1 + z**2 / n
    centre = (rate + z**2 / (2 * n)) / shrink
    half = z * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2)) / shrink
    # Exact at the ends, where rounding would leave the interval beside its own proportion.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == n else centre + half)


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """`{accuracy, n, ci95: [low, high]}` as fractions."""
    hits, n = sum(correct), len(correct)
    return {"accuracy": hits / n, "n": n, "ci95": list(wilson_interval(hits, n))}


def bootstrap_mean(
    values: np.ndarray | Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean over languages and rows, and its 95% percentile interval (Efron, 1979).

    Rows are drawn anew, each with all its languages: the same row in several languages is no
    independent evidence. Differences between two models on the same rows are paired alike.
    Languages of different numbers of rows share none, and are drawn each by itself.

    Args:
      values: [languages, rows].
    """
    rng = np.random.default_rng(seed)
    if len({len(rows) for rows in values}) > 1:
        every = [np.asarray(rows, float) for rows in values]
        means = np.mean([rows[rng.integers(len(rows), size=(resamples, len(rows)))].mean(axis=1)
                         for rows in every], axis=0)
        low, high = np.quantile(means, (0.025, 0.975))
        return float(np.mean([rows.mean() for rows in every])), (float(low), float(high))
    by_row = np.asarray(values, float).mean(axis=0)
    means = by_row[rng.integers(len(by_row), size=(resamples, len(by_row)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(by_row.mean()), (float(low), float(high))
