"""Judging a diagnostic model by repeated cross-validation over patients, beside models that must not do as well.

Every smear is predicted in each repeat by a model that has seen no smear of its patient. The area under the ROC curve is
the mean over the repeats; its interval resamples patients (percentile bootstrap), for the model and its rivals at once, so
that differences are paired. The rivals: each part of the features alone, and two nulls that know nothing of morphology:
the number of cells and the mean colour. A model that does not pass the nulls has learnt the collection, not the disease.
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
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Figures of each model, and the mean out-of-fold probabilities of the first.

    Args:
        tables: name to features, a row a smear; the first is the model, the others its rivals.

    Returns:
        auc of each group against the rest and of their mean, with 95 % intervals; what the model gains on each rival;
        balanced accuracy, Brier score and expected calibration error of the model.
    """
    names = sorted(set(groups))
    scores: dict[str, list[Floats]] = {}
    for name, table in tables.items():
        progress(f"cross-validating '{name}': {table.shape[1]} features, {params.repeats} repeats")
        calibrate = not scores  # ranks, all that is asked of a rival, do not hang on its temperature
        scores[name] = [out_of_fold(table, groups, patients, params, r, calibrate) for r in range(params.repeats)]
    draws = _draws(groups, patients, params.seed)
    curves = {
        name: {group: _Ranking(repeats, groups.to_numpy() == group, k) for k, group in enumerate(names)}
        for name, repeats in scores.items()
    }
    figures: dict[str, Any] = {}
    spread: dict[str, Floats] = {}
    for name, by_group in curves.items():
        rankings = list(by_group.values())[-1:] if len(names) == 2 else list(by_group.values())
        spread[name] = np.array([np.nanmean([r.auc(d) for r in rankings]) for d in draws])
        figures[name] = {
            "auc": float(np.mean([r.auc() for r in rankings])),
            "auc_interval": _interval(spread[name]),
            "auc_by_group": {g: r.auc() for g, r in by_group.items()},
            "num_features": int(tables[name].shape[1]),
        }
    main, *rivals = tables
    for rival in rivals:
        gain = spread[main] - spread[rival]
        figures[rival]["model_gains"] = figures[main]["auc"] - figures[rival]["auc"]
        figures[rival]["model_gains_interval"] = _interval(gain)
    mean = np.mean(scores[main], axis=0)
    truth = np.array([names.index(g) for g in groups])
    chosen = mean.argmax(axis=1)
    figures[main] |= {
        "balanced_accuracy": float(balanced_accuracy_score(truth, chosen)),
        "accuracy": float((truth == chosen).mean()),
        "brier": float(np.mean([_brier(s, truth) for s in scores[main]])),
        "calibration_error": float(np.mean([_calibration_error(s, truth) for s in scores[main]])),
        "confusion": {
            g: {h: int(((truth == i) & (chosen == j)).sum()) for j, h in enumerate(names)} for i, g in enumerate(names)
        },
    }
    return figures, pd.DataFrame(mean, groups.index, [f"p_{n}" for n in names])


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
