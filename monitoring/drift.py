"""Whether the smears of a window differ from those of a reference by more than smears and days differ among themselves.

Smears, not cells, are compared: cells of one smear are not independent, and a test on 10^5 cells fires always. The distance
of a feature is the first Wasserstein distance between the smears of both. Its threshold comes from resampling: the days (the
smears, where days are not known) of window and reference together are dealt anew to a window of the same size, 999 times.
Such a permutation keeps its false-alarm rate at any size; a bootstrap of the reference alone does not
(bench/results/false_alarms.json). The rate is that of one verdict over all features of all families: each distance is put in
units of its own 99th percentile, and the threshold is the 95th percentile of the largest (single-step maximum; Westfall &
Young 1993, Resampling-Based Multiple Testing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, computed_field

from monitoring.smears import describe, families

FALSE_ALARM_RATE = 0.05
LEAST_SMEARS, LEAST_REFERENCE = 5, 8
"""In the window and in the reference: 13 choose 5 is 1,287 ways to deal, enough for the rate over all features."""
_LEAST_DEALS = 200
"""Where the days can be dealt in fewer ways they cannot carry the rate: smears are dealt, and the verdict says so."""
_REPLICATES, _SEED = 999, 7
_GROUPS = (("staining", "optics", "mix"), ("confidence", "embedding"))
"""Judged on all smears of the reference, and on those that training did not see."""

Floats = NDArray[np.float32]


class Feature(BaseModel):
    """One feature, window against reference, over the smears that have it, in the reader's unit."""

    model_config = ConfigDict(frozen=True)

    name: str
    words: str
    unit: str
    num_smears: int
    reference: float
    low: float
    high: float
    """Median and the central 95 % of the reference's smears."""
    now: float
    distance: float
    threshold: float

    @computed_field  # type: ignore[prop-decorator]
    @property
    def shift(self) -> float:
        return round(self.now - self.reference, 5)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def moved(self) -> bool:
        return self.distance > self.threshold

    @property
    def ratio(self) -> float:
        return self.distance / self.threshold


@dataclass(frozen=True)
class Comparison:
    features: dict[str, tuple[Feature, ...]]
    """By family, the judged ones."""
    because: dict[str, str]
    """By family: why it cannot be judged."""
    too_few_days: bool
    """Days are known, but too few to deal them."""

    @property
    def farthest(self) -> float:
        return max((f.ratio for features in self.features.values() for f in features), default=math.inf)


def compare(window: pd.DataFrame, reference: pd.DataFrame, because: dict[str, str]) -> Comparison:
    """Judge every family that `because` does not exclude already. Both are rows of `smears.by_smear`."""
    because = dict(because)
    if len(window) < LEAST_SMEARS:
        because = dict.fromkeys(
            families(), f"{len(window)} smears with enough cells came in; {LEAST_SMEARS} are needed"
        )
    random, distances, samples = np.random.default_rng(_SEED), {}, {}
    days, too_few_days = _deal_days(window, reference)
    for group in _GROUPS:
        base = reference if group == _GROUPS[0] else reference[~reference["seen"].astype(bool)]
        if len(base) < LEAST_REFERENCE:
            what = "smears" if group == _GROUPS[0] else "smears that training did not see"
            few = f"the reference has {len(base)} {what}; {LEAST_REFERENCE} are needed"
            because |= {f: few for f in group if f not in because}
        judged = [(f, name) for f in group if f not in because for name in families()[f]]
        dealt = _deal(random, window, base, days) if judged else None
        for family, name in judged:
            there, here = base[name].dropna(), window[name].dropna()
            if dealt and len(here) >= LEAST_SMEARS and len(there) >= LEAST_REFERENCE:
                values = np.concatenate([base[name], window[name]]).astype(np.float32)
                distances[name], samples[name] = _distances(values, *dealt), (family, there, here)
    thresholds = _thresholds(distances)
    features: dict[str, list[Feature]] = {}
    for name, (family, there, here) in samples.items():
        features.setdefault(family, []).append(_feature(name, there, here, float(distances[name][0]), thresholds[name]))
    because |= {f: "too few smears show its features" for f in families() if f not in features and f not in because}
    return Comparison({f: tuple(v) for f, v in features.items()}, because, too_few_days)


def _feature(name: str, there: pd.Series, here: pd.Series, distance: float, threshold: float) -> Feature:
    is_, (low, middle, high) = describe(name), np.quantile(there, [0.025, 0.5, 0.975])
    numbers = {
        "reference": middle,
        "low": low,
        "high": high,
        "now": here.median(),
        "distance": distance,
        "threshold": threshold,
    }
    scaled = {key: round(float(value) * is_.factor, 5) for key, value in numbers.items()}
    return Feature(name=name, words=is_.words, unit=is_.unit, num_smears=len(here), **scaled)


def _deal_days(window: pd.DataFrame, reference: pd.DataFrame) -> tuple[bool, bool]:
    """(whether days can be dealt, whether they are known but too few)."""
    if window["day"].isna().any() or reference["day"].isna().any():
        return False, False
    unseen = reference[~reference["seen"].astype(bool)]
    here, there = window["day"].nunique(), (unseen if len(unseen) else reference)["day"].nunique()
    enough = math.comb(here + there, here) >= _LEAST_DEALS
    return enough, not enough


def _deal(
    random: np.random.Generator, window: pd.DataFrame, reference: pd.DataFrame, days: bool
) -> tuple[Floats, Floats]:
    """(in the window, in the reference): rows of 0 and 1 over the reference's smears, then the window's.

    Row 0 is what happened. A dealt window takes as many smears of its days as the true one has; the rest of such a day is
    left out, since it is no independent witness.
    """
    both = (reference, window)
    here, there = (pd.factorize(f["day"])[0] if days else np.arange(len(f)) for f in both[::-1])
    block = np.concatenate([there, here + there.max() + 1])
    size, first = np.bincount(block), there.max() + 1
    place = pd.Series(block).groupby(block).cumcount().to_numpy()
    order = np.argsort(random.random((_REPLICATES, len(size))), axis=1)[:, : len(size) - first]
    order = np.vstack([np.arange(first, len(size)), order])
    taken = np.zeros((len(order), len(size)), np.int64)
    np.put_along_axis(taken, order, np.broadcast_to(size[first:], order.shape), axis=1)
    turn = random.integers(0, 1 << 30, taken.shape)
    inside = (place + turn[:, block]) % size[block] < taken[:, block]
    return inside.astype(np.float32), (taken[:, block] == 0).astype(np.float32)


def _distances(values: Floats, inside: Floats, outside: Floats) -> Floats:
    """First Wasserstein distance of each deal: the area between the two distribution functions."""
    known = np.flatnonzero(~np.isnan(values))
    order = known[np.argsort(values[known], kind="stable")]
    a, b = (m[:, order] / np.maximum(m[:, order].sum(axis=1, keepdims=True), 1) for m in (inside, outside))
    return np.asarray(np.abs(np.cumsum(a - b, axis=1)[:, :-1]) @ np.diff(values[order]))


def _thresholds(distances: dict[str, Floats]) -> dict[str, float]:
    """Balanced over all features: the largest distance passes its own in FALSE_ALARM_RATE of the deals."""
    if not distances:
        return {}
    found = np.stack(list(distances.values()), axis=1)
    unit = np.maximum(np.quantile(found, 0.99, axis=0), 1e-9)
    largest = np.sort((found / unit).max(axis=1))
    factor = largest[math.ceil((1 - FALSE_ALARM_RATE) * len(largest)) - 1]
    return {name: max(float(factor * u), describe(name).floor) for name, u in zip(distances, unit, strict=True)}
