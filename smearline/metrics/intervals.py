"""95 % intervals that do not collapse.

Cells of one patient are not independent, so patients are resampled (cluster bootstrap: Davison & Hinkley 1997,
Bootstrap Methods and their Application, 3.8; Field & Welsh 2007, JRSS B 69:369). Where every resample agrees, at a
sensitivity of 1 or with few patients, the bootstrap collapses to a point; the interval reported is therefore the union
of the bootstrap's and of one that takes cells as independent: Wilson's (1927), Clopper & Pearson's (1934) at 0 or all,
and their counterparts for an F1, a mean of proportions, a paired difference and an AUC. None knows patients never
seen: with few patients an interval still says little, so the number of patients stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import beta

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Estimate = dict[str, float]
"""value, low, high; NaN where nothing can be said (written as null)."""
Bounds = tuple[Floats, Floats]

RESAMPLES = 1000
Z = 1.959963984540054
ALPHA = 0.05


def bootstrap_counts(cluster_N: Ints, index_NM: Ints, size: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Counts of categories, observed and in each resample of the clusters.

    Args:
        cluster_N: cluster of each cell, any integers.
        index_NM: the M categories, each in 0..size-1, that a cell adds 1 to.

    Returns:
        observed (size,) and replicates (RESAMPLES, size). Clusters of one cell with equal categories are
        interchangeable and drawn together, which is the same distribution: 130,000 cells without patients cost as
        little as a few hundred patients.
    """
    _, cluster_N, cells_C = np.unique(cluster_N, return_inverse=True, return_counts=True)
    single_N = cells_C[cluster_N] == 1
    many, many_N = np.unique(cluster_N[~single_N], return_inverse=True)
    flat = (many_N[:, None] * size + index_NM[~single_N]).ravel()
    grouped = np.bincount(flat, minlength=len(many) * size).reshape(len(many), size)
    alone, multiplicity = np.unique(index_NM[single_N], axis=0, return_counts=True)
    ones = np.zeros((len(alone), size))
    np.add.at(ones, (np.arange(len(alone))[:, None], alone), 1)
    profiles = np.concatenate([grouped, ones]).astype(float)
    share = np.concatenate([np.ones(len(many)), multiplicity])
    observed = share @ profiles
    drawn = [rng.multinomial(len(cells_C), share / share.sum(), size=RESAMPLES // 10) @ profiles for _ in range(10)]
    return observed, np.concatenate(drawn)


def exact_bounds(hits: ArrayLike, total: ArrayLike) -> Bounds:
    """Clopper & Pearson's exact binomial bounds; NaN where total is 0."""
    k, n = np.asarray(hits, float), np.asarray(total, float)
    with np.errstate(invalid="ignore"):
        low = np.where(k > 0, beta.ppf(ALPHA / 2, np.maximum(k, 1e-9), n - k + 1), 0.0)
        high = np.where(k < n, beta.ppf(1 - ALPHA / 2, k + 1, np.maximum(n - k, 1e-9)), 1.0)
    return np.where(n > 0, low, np.nan), np.where(n > 0, high, np.nan)


def proportion_bounds(hits: ArrayLike, total: ArrayLike) -> Bounds:
    """Wilson's score bounds, Clopper-Pearson's where hits is 0 or all; NaN where total is 0."""
    k, n = np.asarray(hits, float), np.asarray(total, float)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = k / n
        centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
        half = Z / (1 + Z**2 / n) * np.sqrt(np.maximum(p * (1 - p), 0) / n + Z**2 / (4 * n**2))
    exact = exact_bounds(k, n)
    end = (k <= 0) | (k >= n)
    return np.where(end, exact[0], centre - half), np.where(end, exact[1], centre + half)


def f1_bounds(f1: ArrayLike, union: ArrayLike) -> Bounds:
    """Bounds of an F1 from those of J = TP / (TP + FP + FN), a proportion of `union` cells: F1 = 2 J / (1 + J)."""
    f, n = np.asarray(f1, float), np.asarray(union, float)
    low, high = proportion_bounds(np.where(f >= 1, n, f / (2 - f) * n), n)
    return 2 * low / (1 + low), 2 * high / (1 + high)


def mean_bounds(values: Floats, bounds: Bounds) -> tuple[float, float]:
    """Bounds of the mean of independent estimates from their own (MOVER: Zou & Donner 2008, Stat Med 27:1693)."""
    down, up = (float(np.sqrt(np.sum((values - side) ** 2)) / len(values)) for side in bounds)
    return float(values.mean()) - down, float(values.mean()) + up


def paired_bounds(only_first: float, only_second: float, total: float) -> tuple[float, float]:
    """Bounds of a difference of two paired proportions (Agresti & Min 2005, Stat Med 24:729: half a cell added)."""
    b, c, n = only_first + 0.5, only_second + 0.5, total + 2
    half = Z * float(np.sqrt(b + c - (b - c) ** 2 / n)) / n
    return (b - c) / n - half, (b - c) / n + half


def interval(value: float, replicates: Floats, bounds: tuple[float, float]) -> Estimate:
    """The union of the bootstrap's percentile interval and `bounds`; NaN throughout where the value is NaN."""
    if not np.isfinite(value):
        return {"value": np.nan, "low": np.nan, "high": np.nan}
    kept = replicates[np.isfinite(replicates)]
    low, high = np.quantile(kept, [ALPHA / 2, 1 - ALPHA / 2]) if len(kept) else (value, value)
    return {"value": value, "low": float(min(value, low, bounds[0])), "high": float(max(value, high, bounds[1]))}


def ratio(hits: Floats, total: Floats) -> Floats:
    """hits / total, NaN where total is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(hits / total)


def share_by_cluster(right_N: NDArray[np.bool_], cluster_N: Ints, rng: np.random.Generator) -> Estimate:
    """The share of True with its interval; the clusters are resampled."""
    if not len(right_N):
        return interval(np.nan, np.empty(0), (np.nan, np.nan))
    (no, yes), drawn = bootstrap_counts(cluster_N, right_N.astype(np.int64)[:, None], 2, rng)
    low, high = proportion_bounds(yes, yes + no)
    return interval(yes / (yes + no), ratio(drawn[:, 1], drawn.sum(axis=1)), (float(low), float(high)))


def auc_interval(score_N: Floats, positive_N: NDArray[np.bool_], cluster_N: Ints, rng: np.random.Generator) -> Estimate:
    """Area under the ROC curve (Mann-Whitney, ties count half) with its interval; the clusters are resampled.

    The bounds that take cells as independent are those of Newcombe 2006 (Stat Med 25:559, method 5), which keep a
    width at an AUC of 1.
    """
    num_positive, num_negative = int(positive_N.sum()), int((~positive_N).sum())
    if not num_positive or not num_negative:
        return interval(np.nan, np.empty(0), (np.nan, np.nan))
    negatives = np.flatnonzero(~positive_N)
    negatives = negatives[np.argsort(score_N[negatives], kind="stable")]
    below = np.searchsorted(score_N[negatives], score_N[positive_N], side="left")
    upto = np.searchsorted(score_N[negatives], score_N[positive_N], side="right")

    def area(weight_N: Floats) -> float:
        cumulated = np.concatenate([[0.0], np.cumsum(weight_N[negatives])])
        weight = weight_N[positive_N]
        pairs = weight.sum() * cumulated[-1]
        return float(weight @ (cumulated[below] + cumulated[upto]) / 2 / pairs) if pairs else np.nan

    clusters, cluster_N = np.unique(cluster_N, return_inverse=True)
    num = len(clusters)
    drawn = (np.bincount(rng.integers(0, num, num), minlength=num).astype(float) for _ in range(RESAMPLES))
    value = area(np.ones(len(score_N)))
    replicates = np.array([area(weight_C[cluster_N]) for weight_C in drawn])
    return interval(value, replicates, _newcombe_auc(value, num_positive, num_negative))


def _newcombe_auc(auc: float, m: int, n: int) -> tuple[float, float]:
    half = (m + n) / 2 - 1

    def gap(sign: float) -> Callable[[float], float]:
        def at(t: float) -> float:
            variance = t * (1 - t) * (1 + half * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n)
            return (auc - t) * sign - Z * float(np.sqrt(variance))

        return at

    apart = 1e-9  # from the trivial root that the equation has at an AUC of 0 or 1
    low = 0.0 if auc <= apart else float(brentq(gap(1), 0, auc - apart))
    high = 1.0 if auc >= 1 - apart else float(brentq(gap(-1), auc + apart, 1))
    return low, high
