"""Accuracy with confidence intervals, and significance tests between runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """95% score interval of a proportion (Wilson, 1927), as fractions."""
    from scipy.stats import binomtest  # slow to import, and not needed in training

    interval = binomtest(correct, n).proportion_ci(method="wilson")
    # Exact at 0 and 1, where rounding could exclude the proportion itself.
    return (0.0 if correct == 0 else float(interval.low),
            1.0 if correct == n else float(interval.high))


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """`{accuracy, n, ci95: [low, high]}` as fractions."""
    hits, n = sum(correct), len(correct)
    return {"accuracy": hits / n, "n": n, "ci95": list(wilson_interval(hits, n))}


def bootstrap_mean(
    values: np.ndarray | Sequence[Sequence[float]], resamples: int = 2000, seed: int = 0
) -> tuple[float, tuple[float, float]]:
    """Mean over languages and rows, and its 95% percentile interval (Efron, 1979).

    Rows are resampled jointly across languages, since translations are not independent; so are
    differences between two models on the same rows. Languages with different numbers of rows are
    not parallel and are resampled separately.

    Args:
      values: [languages, rows].
    """
    rng = np.random.default_rng(seed)
    if len({len(rows) for rows in values}) > 1:
        arrays = [np.asarray(rows, float) for rows in values]
        means = np.mean([rows[rng.integers(len(rows), size=(resamples, len(rows)))].mean(axis=1)
                         for rows in arrays], axis=0)
        low, high = np.quantile(means, (0.025, 0.975))
        return float(np.mean([rows.mean() for rows in arrays])), (float(low), float(high))
    by_row = np.asarray(values, float).mean(axis=0)
    means = by_row[rng.integers(len(by_row), size=(resamples, len(by_row)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(by_row.mean()), (float(low), float(high))


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """Two-sided exact p-value of the null hypothesis that two runs are equally accurate.

    Under it, rows that only one run gets right are split evenly by chance (McNemar, 1947; the
    binomial form, without the χ² approximation).

    Args:
      before, after: [rows] 0 or 1.
    """
    from scipy.stats import binomtest  # slow to import, and not needed in training

    gained, lost = int(np.sum(after > before)), int(np.sum(after < before))
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flip(
    values: np.ndarray | Sequence[Sequence[float]], resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value that a mean over languages and rows is 0: the paired permutation test.

    The runs are swapped at random for every row, jointly across languages (Fisher, 1935); for one
    language and one seed it is McNemar's test. The smallest possible p-value is
    1 / (resamples + 1).

    Args:
      values: [languages, rows], differences of two runs on the same rows. Languages with different
        numbers of rows are not parallel and are swapped separately.
    """
    if len({len(rows) for rows in values}) == 1:
        rows = np.asarray(values, float).mean(axis=0) / len(values[0])
    else:
        rows = np.concatenate([np.asarray(x, float) / len(x) for x in values]) / len(values)
    observed, rows = abs(rows.sum()), rows[rows != 0]
    rng, extreme, done = np.random.default_rng(seed), 0, 0
    while done < resamples:  # in parts: all signs at once may not fit into memory
        signs = rng.integers(0, 2, size=(min(500, resamples - done), len(rows)), dtype=np.int8)
        sums = np.abs((2.0 * signs - 1.0) @ rows)
        extreme, done = extreme + int(np.sum(sums >= observed - 1e-12)), done + len(signs)
    return (extreme + 1) / (resamples + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted to control the family-wise error rate (Holm, 1979)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
