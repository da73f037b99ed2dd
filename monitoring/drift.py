"""Whether the smears of a window differ from those of a reference by more than smears and days differ among themselves.

Smears, not cells, are compared: cells of one smear are not independent, and a test on 10^5 cells fires always. Nor are the
smears of a day, or of a patient: each day (each patient, where days are not known) counts once, with the mean of its smears.
The distance of a feature is the first Wasserstein distance between the days of window and reference. Its threshold comes from
resampling: the days of both are dealt anew to a window of the same size, 999 times. Such a permutation keeps its false-alarm
rate at any size, as far as days are independent of one another; a bootstrap of the reference alone does not
(bench/results/false_alarms.json). The rate is that of one verdict over all features of all families: each distance is put in
units of its own 99th percentile, and the threshold is the 95th percentile of the largest (single-step maximum; Westfall &
Young 1993, Resampling-Based Multiple Testing).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel

from monitoring.smears import ALWAYS_SHOWN, describe, families

FALSE_ALARM_RATE = 0.05
LEAST_SMEARS, LEAST_REFERENCE = 5, 8
"""In the window and in the reference: 13 choose 5 is 1,287 ways to deal, enough for the rate over all features."""
_LEAST_DEALS = 200
"""Where days (patients) can be dealt in fewer ways they cannot carry the rate: smears are dealt, and the verdict says so."""
_REPLICATES, _SEED = 999, 7
_GROUPS = (("staining", "optics", "mix"), ("confidence", "embedding"))
"""Judged on all smears of the reference, and on those that training did not see."""

Floats = NDArray[np.float32]


class Feature(BaseModel, frozen=True):
    """One feature, window against reference, over the smears that have it, in the reader's unit."""

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
    shift: float
    moved: bool

    @property
    def ratio(self) -> float:
        return self.distance / self.threshold


@dataclass(frozen=True)
class Comparison:
    features: dict[str, tuple[Feature, ...]]
    """By family, the judged ones."""
    because: dict[str, str]
    """By family: why it cannot be judged."""
    lost: dict[str, tuple[str, ...]]
    """By family: features that the reference's smears show and most of the window's do not."""
    too_few: str | None
    """'days' or 'patients': they are known, but too few to deal them, so smears were dealt."""

    @property
    def farthest(self) -> float:
        return max((f.ratio for features in self.features.values() for f in features), default=math.inf)


def compare(window: pd.DataFrame, reference: pd.DataFrame, because: dict[str, str]) -> Comparison:
    """Judge every family that `because` does not exclude already. Both are rows of `smears.by_smear`."""
    because = dict(because)
    if len(window) < LEAST_SMEARS:
        few = f"{len(window)} smears with enough cells came in; {LEAST_SMEARS} are needed"
        because = dict.fromkeys(families(), few)
    random, distances, samples = np.random.default_rng(_SEED), {}, {}
    unit, too_few = _unit(window, reference)
    lost: dict[str, tuple[str, ...]] = {}
    for group in _GROUPS:
        base = reference if group == _GROUPS[0] else reference[~reference["seen"].astype(bool)]
        if len(base) < LEAST_REFERENCE:
            what = "smears" if group == _GROUPS[0] else "smears that training did not see"
            few = f"the reference has {len(base)} {what}; {LEAST_REFERENCE} are needed"
            because |= {f: few for f in group if f not in because}
        judged = [(f, name) for f in group if f not in because for name in families()[f]]
        if not judged:
            continue
        here, there = _blocks(window, base, unit, [name for _, name in judged], random)
        inside = _deal(random, len(there), len(here))
        for family, name in judged:
            old, new = base[name].dropna(), window[name].dropna()
            if len(old) >= LEAST_REFERENCE and len(new) >= LEAST_SMEARS:
                values = np.concatenate([there[name], here[name]]).astype(np.float32)
                distances[name], samples[name] = _distances(values, inside, 1 - inside), (family, old, new)
            if name in ALWAYS_SHOWN and len(old) > len(base) / 2 and len(new) < len(window) / 2:
                lost[family] = (*lost.get(family, ()), name)
    thresholds = _thresholds(distances)
    features: dict[str, list[Feature]] = {}
    for name, (family, old, new) in samples.items():
        features.setdefault(family, []).append(_feature(name, old, new, float(distances[name][0]), thresholds[name]))
    because |= {f: "too few smears show its features" for f in families() if f not in features and f not in because}
    return Comparison({f: tuple(v) for f, v in features.items()}, because, lost, too_few)


def _feature(name: str, there: pd.Series, here: pd.Series, distance: float, threshold: float) -> Feature:
    is_, (low, middle, high) = describe(name), np.quantile(there, [0.025, 0.5, 0.975])
    numbers = dict(reference=middle, low=low, high=high, now=here.median(), distance=distance, threshold=threshold)
    told: dict[str, Any] = {key: round(float(value) * is_.factor, 5) for key, value in numbers.items()}
    told |= {"shift": round(told["now"] - told["reference"], 5), "moved": told["distance"] > told["threshold"]}
    return Feature(name=name, words=is_.words, unit=is_.unit, num_smears=len(here), **told)


def _unit(window: pd.DataFrame, reference: pd.DataFrame) -> tuple[str, str | None]:
    """(the column whose values are dealt; what is known, but too few to be dealt)."""
    unseen = reference[~reference["seen"].astype(bool)]
    too_few = None
    for unit in ("day", "patient"):
        both = [window[unit], (unseen if len(unseen) else reference)[unit]]
        known = [part.dropna() for part in both]
        if any(part.isna().any() for part in both) if unit == "day" else not any(k.duplicated().any() for k in known):
            continue
        here, there = (part.nunique() + int(part.isna().sum()) for part in both)
        if math.comb(here + there, here) >= _LEAST_DEALS:
            return unit, None
        too_few = too_few or f"{unit}s"
    return "smear", too_few


def _blocks(
    window: pd.DataFrame, base: pd.DataFrame, unit: str, names: list[str], random: np.random.Generator
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row a day (patient, smear): the mean of its smears. Of the reference's days no more smears are taken than a day of the
    window has (harmonic mean), since the mean of many would differ less than the window's own."""

    def keys(frame: pd.DataFrame) -> pd.Series:
        return frame[unit].astype(object).where(frame[unit].notna(), frame["smear"])

    sizes = keys(window).value_counts()
    most = max(1, int(1 / (1 / sizes).mean())) if len(sizes) else 1
    base = base.iloc[random.permutation(len(base))]
    base = base[base.groupby(keys(base), sort=False).cumcount() < most]
    here, there = (frame[names].astype(float).groupby(keys(frame)).mean() for frame in (window, base))
    return here, there


def _deal(random: np.random.Generator, there: int, here: int) -> Floats:
    """Rows of 0 and 1 over the reference's blocks, then the window's: which are in the window. Row 0 is what happened."""
    order = np.argsort(random.random((_REPLICATES, there + here)), axis=1)[:, :here]
    order = np.vstack([np.arange(there, there + here), order])
    inside = np.zeros((len(order), there + here), np.float32)
    np.put_along_axis(inside, order, 1.0, axis=1)
    return inside


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
