"""95 % intervals that do not collapse.

Cells of one patient are not independent, so patients are resampled (cluster bootstrap: Davison & Hinkley 1997,
Bootstrap Methods and their Application, 3.8; Field & Welsh 2007, JRSS B 69:369). Where every resample agrees, at a
sensitivity of 1 or with few patients, the bootstrap collapses to a point; the interval reported is therefore the union
of the bootstrap's and of one that takes cells as independent: Wilson's (1927), Clopper & Pearson's (1934) at 0 or all,
and their counterparts for an F1, a mean of proportions, a paired difference and an AUC. None knows patients never
seen: with few patients an interval still says little, so the number of patients stands beside it.

Legend of shapes: N cells, B = 1 + RESAMPLES, of which the first is observed and the others are its replicates.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import beta, norm

from smearline.metrics.cells import Bools, Ints

Floats = NDArray[np.float64]
Estimate = dict[str, float]  # value, low, high; NaN where nothing can be said (written as null)
UNKNOWN: Estimate = dict.fromkeys(("value", "low", "high"), np.nan)
Bounds = tuple[Floats, Floats]

RESAMPLES = 1000
Z = 1.959963984540054
ALPHA = 0.05


def bootstrap_counts(cluster_N: ArrayLike, index_NM: Ints, size: int, rng: np.random.Generator) -> Floats:
    """Counts [B, size] of the M categories, each in 0..size-1, that a cell adds 1 to; the clusters are resampled.

    Clusters of one cell with equal categories are interchangeable and drawn together, which is the same distribution:
    130,000 cells without patients cost as little as a few hundred patients.
    """
    _, of_N, cells_C = np.unique(cluster_N, return_inverse=True, return_counts=True)
    single_N = cells_C[of_N] == 1
    many, many_N = np.unique(of_N[~single_N], return_inverse=True)
    flat = (many_N[:, None] * size + index_NM[~single_N]).ravel()
    grouped = np.bincount(flat, minlength=len(many) * size).reshape(len(many), size)
    alone, multiplicity = np.unique(index_NM[single_N], axis=0, return_counts=True)
    ones = np.zeros((len(alone), size))
    np.add.at(ones, (np.arange(len(alone))[:, None], alone), 1)
    profiles = np.concatenate([grouped, ones]).astype(float)
    share = np.concatenate([np.ones(len(many)), multiplicity])
    drawn = [rng.multinomial(len(cells_C), share / share.sum(), size=RESAMPLES // 10) @ profiles for _ in range(10)]
    return np.concatenate([share[None] @ profiles, *drawn])


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


def ratio(hits: Floats, total: Floats) -> Floats:
    """hits / total, NaN where total is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(hits / total)


def interval(values_B: Floats, low: float | Floats, high: float | Floats, level: float = 1 - ALPHA) -> Estimate:
    """The union of the bootstrap's percentile interval and the bounds given; unknown where the value is NaN."""
    value, kept = float(values_B[0]), values_B[1:][np.isfinite(values_B[1:])]
    if not np.isfinite(value):
        return UNKNOWN
    ends = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2]) if len(kept) else (value, value)
    low, high = min(value, float(ends[0]), float(low)), max(value, float(ends[1]), float(high))
    return {"value": value, "low": low, "high": high}


def proportion(hits_B: Floats, total_B: Floats) -> Estimate:
    return interval(ratio(hits_B, total_B), *proportion_bounds(hits_B[0], total_B[0]))


def mean(values_BC: Floats, bounds: Bounds, level: float = 1 - ALPHA) -> Estimate:
    """The mean over classes from their own bounds (MOVER: Zou & Donner 2008, Stat Med 27:1693).

    A resample in which one of them has no cell averages the others.
    """
    if not values_BC.shape[1]:
        return UNKNOWN
    present = np.isfinite(values_BC)
    means_B = ratio(np.where(present, values_BC, 0).sum(axis=1), present.sum(axis=1))
    value, off = values_BC[0].mean(), [np.sqrt(np.sum((values_BC[0] - b) ** 2)) / len(b) for b in bounds]
    return interval(means_B, value - off[0], value + off[1], level)


def paired_difference(
    values_B: Floats, only_first: float, only_second: float, total: float, level: float = 1 - ALPHA
) -> Estimate:
    """A difference of two paired proportions (bounds: Agresti & Min 2005, Stat Med 24:729: half a cell added)."""
    b, c, n = only_first + 0.5, only_second + 0.5, total + 2
    half = float(norm.ppf((1 + level) / 2) * np.sqrt(b + c - (b - c) ** 2 / n)) / n
    return interval(values_B, (b - c) / n - half, (b - c) / n + half, level)


def share(right_N: ArrayLike, cluster_N: ArrayLike, rng: np.random.Generator) -> Estimate:
    """The share of True with its interval; the clusters are resampled."""
    index_N1 = np.asarray(right_N, np.int64)[:, None]
    if not len(index_N1):
        return UNKNOWN
    counts_B2 = bootstrap_counts(cluster_N, index_N1, 2, rng)
    return proportion(counts_B2[:, 1], counts_B2.sum(axis=1))


def auc(score_N: Floats, positive_N: Bools, cluster_N: ArrayLike, rng: np.random.Generator) -> Estimate:
    """Area under the ROC curve (Mann-Whitney, ties count half) with its interval; the clusters are resampled.

    The bounds that take cells as independent are those of Newcombe 2006 (Stat Med 25:559, method 5), which keep a
    width at an AUC of 1.
    """
    num_positive, num_negative = int(positive_N.sum()), int((~positive_N).sum())
    if not num_positive or not num_negative:
        return UNKNOWN
    negatives = np.flatnonzero(~positive_N)
    negatives = negatives[np.argsort(score_N[negatives], kind="stable")]
    below, upto = (np.searchsorted(score_N[negatives], score_N[positive_N], side) for side in ("left", "right"))

    def area(weight_N: Floats) -> float:
        cumulated = np.concatenate([[0.0], np.cumsum(weight_N[negatives])])
        weight = weight_N[positive_N]
        pairs = weight.sum() * cumulated[-1]
        return float(weight @ (cumulated[below] + cumulated[upto]) / 2 / pairs) if pairs else np.nan

    clusters, of_N = np.unique(cluster_N, return_inverse=True)
    num = len(clusters)
    drawn = (np.bincount(rng.integers(0, num, num), minlength=num).astype(float)[of_N] for _ in range(RESAMPLES))
    values_B = np.array([area(np.ones(len(score_N))), *map(area, drawn)])
    return interval(values_B, *auc_bounds(values_B[0], num_positive, num_negative))


def auc_bounds(auc: float, m: int, n: int) -> tuple[float, float]:
    """Newcombe's bounds (2006, method 5) of an area from m independent positives and n negatives."""

    def gap(t: float, sign: int) -> float:
        variance = t * (1 - t) * (1 + ((m + n) / 2 - 1) * ((1 - t) / (2 - t) + t / (1 + t))) / (m * n)
        return (auc - t) * sign - Z * float(np.sqrt(variance))

    apart = 1e-9  # from the trivial root that the equation has at an AUC of 0 or 1
    low = 0.0 if auc <= apart else float(brentq(gap, 0, auc - apart, args=(1,)))
    high = 1.0 if auc >= 1 - apart else float(brentq(gap, auc + apart, 1, args=(-1,)))
    return low, high
