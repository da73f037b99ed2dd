"""Judging a diagnostic model by repeated cross-validation over patients, beside models that must not do as well.

Every smear is predicted in each repeat by a model that has seen no smear of its patient. The area under the ROC curve is
the mean over the repeats, of scores that no temperature has touched (each fold has its own, which would mix the ranks); its
interval resamples patients (percentile bootstrap), for the model and its rivals at once, so that differences are paired, and
is never narrower than Newcombe's for so many patients. It does not hold what another training set would have changed: on
simulated patients the bootstrap covered the true area in 85 %, not 95 %. The rivals: each part of the features alone, and two
nulls that know nothing of morphology: the number of cells and the mean colour. A model that does not pass the nulls has
learnt the collection, not the disease.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold

from smearline import diagnosis
from smearline.metrics.intervals import auc_bounds
from smearline.settings import DiagnosisSettings

Floats = NDArray[np.float64]
NUM_BOOTSTRAPS = 2000
_FOLDS = 5


def out_of_fold(
    table: pd.DataFrame, groups: pd.Series, patients: pd.Series, params: DiagnosisSettings, repeat: int, calibrate: bool
) -> Floats:
    """Probabilities (N smears x K groups, groups sorted), each from a model that has not seen the smear's patient."""
    names = sorted(set(groups))
    num_folds = min(_FOLDS, int(patients.groupby(groups).nunique().min()))
    folds = StratifiedGroupKFold(num_folds, shuffle=True, random_state=params.seed + repeat)
    found = np.full((len(table), len(names)), np.nan)
    for train, test in folds.split(table, groups, patients):
        part = table.iloc[train]
        part = part.loc[:, part.notna().any()]
        model = diagnosis.fit(part, groups.iloc[train], patients.iloc[train], params, calibrate)
        columns = [names.index(g) for g in model.groups]
        found[np.ix_(test, columns)] = model.probabilities(table.iloc[test][part.columns])
    return np.nan_to_num(found)


def evaluate(
    tables: Mapping[str, pd.DataFrame],
    groups: pd.Series,
    patients: pd.Series,
    params: DiagnosisSettings,
    progress: Callable[[str], None] = lambda _: None,
    seen: pd.Series | None = None,
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Figures of each model, and the mean out-of-fold probabilities of the first.

    Args:
        tables: name to features, a row a smear; the first is the model, the others its rivals.
        seen: of each smear, whether the recogniser was trained on its cells; then figures on the others are given beside.

    Returns:
        auc of each group against the rest and of their mean, with 95 % intervals; what the model gains on each rival;
        balanced accuracy (of the probabilities' mean over the repeats), Brier score and expected calibration error (of each
        repeat) of the model.
    """
    names = sorted(set(groups))
    scores: dict[str, list[Floats]] = {}
    for name, table in tables.items():
        progress(f"cross-validating '{name}': {table.shape[1]} features, {params.repeats} repeats")
        scores[name] = [out_of_fold(table, groups, patients, params, r, False) for r in range(params.repeats)]
    calibrated = [
        out_of_fold(tables[next(iter(tables))], groups, patients, params, r, True) for r in range(params.repeats)
    ]
    draws = _draws(groups, patients, params.seed)
    curves = {
        name: {group: _Ranking(repeats, groups.to_numpy() == group, k) for k, group in enumerate(names)}
        for name, repeats in scores.items()
    }
    figures: dict[str, Any] = {}
    spread: dict[str, Floats] = {}
    for name, by_group in curves.items():
        rankings = {g: by_group[g] for g in (names[-1:] if len(names) == 2 else names)}
        spread[name] = np.array([np.nanmean([r.auc(d) for r in rankings.values()]) for d in draws])
        figures[name] = {
            "auc": float(np.mean([r.auc() for r in rankings.values()])),
            "auc_interval": _area(rankings, spread[name], groups, patients),
            "auc_by_group": {g: r.auc() for g, r in by_group.items()},
            "num_features": int(tables[name].shape[1]),
        }
    main, *rivals = tables
    for rival in rivals:
        gain = spread[main] - spread[rival]
        figures[rival]["model_gains"] = figures[main]["auc"] - figures[rival]["auc"]
        figures[rival]["model_gains_interval"] = _interval(gain)
    if seen is not None:
        figures[main]["by_recogniser_training"] = {
            label: _part(scores[main], groups, patients, names, keep.to_numpy(bool))
            for label, keep in (("seen", seen), ("not_seen", ~seen))
        }
    mean = np.mean(calibrated, axis=0)
    truth = np.array([names.index(g) for g in groups])
    chosen = mean.argmax(axis=1)
    figures[main] |= {
        "balanced_accuracy": float(balanced_accuracy_score(truth, chosen)),
        "accuracy": float((truth == chosen).mean()),
        "brier": float(np.mean([_brier(s, truth) for s in calibrated])),
        "calibration_error": float(np.mean([_calibration_error(s, truth) for s in calibrated])),
        "confusion": {
            g: {h: int(((truth == i) & (chosen == j)).sum()) for j, h in enumerate(names)} for i, g in enumerate(names)
        },
    }
    return figures, pd.DataFrame(mean, groups.index, [f"p_{n}" for n in names])


def _area(rankings: Mapping[str, _Ranking], spread: Floats, groups: pd.Series, patients: pd.Series) -> list[float]:
    """The bootstrap's interval of the mean area, and Newcombe's for so many patients, whichever is wider."""
    num = patients.groupby(groups.to_numpy()).nunique()
    bounds = [auc_bounds(r.auc(), int(num[g]), int(num.sum() - num[g])) for g, r in rankings.items()]
    (low, high), drawn = np.mean(bounds, axis=0), _interval(spread)
    return [min(drawn[0], float(low)), max(drawn[1], float(high))]


def _part(
    scores: list[Floats], groups: pd.Series, patients: pd.Series, names: list[str], keep: NDArray[np.bool_]
) -> dict[str, Any]:
    """The mean area over a part of the smears, of the groups that the part has beside others; None where it has one alone."""
    part, truth = [s[keep] for s in scores], groups.to_numpy()[keep]
    found: dict[str, Any] = {"smears": int(keep.sum()), "auc": None, "auc_interval": None}
    there = [g for g in names if g in set(truth) and (truth != g).any()]
    rankings = {g: _Ranking(part, truth == g, names.index(g)) for g in (there[-1:] if len(names) == 2 else there)}
    if rankings:
        own = groups[keep], patients[keep]
        spread = np.array([np.nanmean([r.auc(d) for r in rankings.values()]) for d in _draws(*own, 0)])
        mean = float(np.mean([r.auc() for r in rankings.values()]))
        found |= {"auc": mean, "auc_interval": _area(rankings, spread, *own)}
    return found


class _Ranking:
    """How often a smear of the group is ranked above one of the rest: mean over the repeats, for each pair of smears."""

    def __init__(self, repeats: list[Floats], of_group: NDArray[np.bool_], column: int) -> None:
        self._of_group = of_group
        wins = np.zeros((int(of_group.sum()), int((~of_group).sum())))
        for scores in repeats:
            difference = scores[of_group, column][:, None] - scores[~of_group, column][None]
            wins += (difference > 0) + 0.5 * (difference == 0)
        self._wins = wins / len(repeats)

    def auc(self, weights: Floats | None = None) -> float:
        """Area under the ROC curve (Mann-Whitney), of smears counted `weights` times; NaN where a side is empty."""
        if weights is None:
            return float(self._wins.mean())
        inside, outside = weights[self._of_group], weights[~self._of_group]
        pairs = inside.sum() * outside.sum()
        return float(inside @ self._wins @ outside / pairs) if pairs else float("nan")


def _draws(groups: pd.Series, patients: pd.Series, seed: int) -> list[Floats]:
    """How often each smear counts in each bootstrap sample: patients drawn with replacement within their group."""
    random = np.random.default_rng(seed)
    keys, places = np.unique(patients.to_numpy(), return_inverse=True)
    group_of = groups.groupby(places).first().to_numpy()
    draws = []
    for _ in range(NUM_BOOTSTRAPS):
        counts = np.zeros(len(keys))
        for group in np.unique(group_of):
            members = np.flatnonzero(group_of == group)
            np.add.at(counts, random.choice(members, len(members)), 1)
        draws.append(counts[places])
    return draws


def _interval(values: Floats) -> list[float]:
    return [float(v) for v in np.nanquantile(values, [0.025, 0.975])]


def _brier(scores: Floats, truth: NDArray[np.int64]) -> float:
    return float(((scores - np.eye(scores.shape[1])[truth]) ** 2).sum(axis=1).mean())


def _calibration_error(scores: Floats, truth: NDArray[np.int64], num_bins: int = 5) -> float:
    """Mean distance of confidence and accuracy over bins of equal count (Naeini et al. 2015, AAAI)."""
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == truth
    bins = np.array_split(np.argsort(confidence, kind="stable"), num_bins)
    return float(sum(abs(confidence[b].mean() - right[b].mean()) * len(b) for b in bins if len(b)) / len(truth))
