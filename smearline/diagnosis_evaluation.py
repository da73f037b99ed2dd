"""Judging a diagnostic model by repeated cross-validation over patients, beside models that must not do as well.

The area under the ROC curve is the mean over the repeats, of scores that no temperature has touched (each fold has its own, which
would mix the ranks); its interval resamples patients, for the model and its rivals at once, so that differences are paired
(docs/diagnosis.md).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import balanced_accuracy_score, brier_score_loss, confusion_matrix
from sklearn.model_selection import StratifiedGroupKFold

from smearline import diagnosis
from smearline.metrics.intervals import auc_bounds
from smearline.metrics.type_scores import calibration_error
from smearline.settings import DiagnosisSettings

Floats = NDArray[np.float64]
NUM_BOOTSTRAPS = 2000
_FOLDS = _BINS = 5


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
    figures: dict[str, Any] = {}
    spread: dict[str, Floats] = {}
    for name, repeats in scores.items():
        figures[name], spread[name] = _areas(repeats, groups, patients, names, draws)
        figures[name]["num_features"] = int(tables[name].shape[1])
    main, *rivals = tables
    for rival in rivals:
        figures[rival]["model_gains"] = figures[main]["auc"] - figures[rival]["auc"]
        figures[rival]["model_gains_interval"] = _interval(spread[main] - spread[rival])
    if seen is not None:
        figures[main]["by_recogniser_training"] = parts = {}
        for label, keep in (("seen", seen.to_numpy(bool)), ("not_seen", ~seen.to_numpy(bool))):
            own = groups[keep], patients[keep]
            areas, _ = _areas([s[keep] for s in scores[main]], *own, names, _draws(*own, 0))
            parts[label] = {"smears": int(keep.sum()), "auc": areas["auc"], "auc_interval": areas["auc_interval"]}
    mean = np.mean(calibrated, axis=0)
    truth, chosen, labels = np.array([names.index(g) for g in groups]), mean.argmax(axis=1), range(len(names))
    briers = [brier_score_loss(truth, s, labels=labels, scale_by_half=False) for s in calibrated]
    errors = [calibration_error(s.max(axis=1), s.argmax(axis=1) == truth, _BINS)[0] for s in calibrated]
    confusion = confusion_matrix(truth, chosen, labels=labels).tolist()
    figures[main] |= {
        "balanced_accuracy": float(balanced_accuracy_score(truth, chosen)),
        "accuracy": float((truth == chosen).mean()),
        "brier": float(np.mean(briers)),
        "calibration_error": float(np.mean(errors)),
        "confusion": {g: dict(zip(names, row, strict=True)) for g, row in zip(names, confusion, strict=True)},
    }
    return figures, pd.DataFrame(mean, groups.index, [f"p_{n}" for n in names])


def _areas(
    repeats: list[Floats], groups: pd.Series, patients: pd.Series, names: list[str], draws: list[Floats]
) -> tuple[dict[str, Any], Floats]:
    """The mean area over the groups that stand beside others (of two groups one says all), each area, and the mean of each draw.

    The interval is the bootstrap's, or Newcombe's for so many patients, whichever is wider; None where there is no area.
    """
    truth, num = groups.to_numpy(), patients.groupby(groups.to_numpy()).nunique()
    there = [g for g in names if g in num and len(num) > 1]
    if not there:
        return {"auc": None, "auc_interval": None}, np.array([])
    rankings = {g: _Ranking(repeats, truth == g, names.index(g)) for g in there}
    areas = {g: r.auc() for g, r in rankings.items()}
    averaged = there[-1:] if len(names) == 2 else there
    spread = np.array([np.nanmean([rankings[g].auc(d) for g in averaged]) for d in draws])
    bounds = [auc_bounds(areas[g], int(num[g]), int(num.sum() - num[g])) for g in averaged]
    (low, high), drawn = np.mean(bounds, axis=0), _interval(spread)
    interval = [min(drawn[0], float(low)), max(drawn[1], float(high))]
    auc = float(np.mean([areas[g] for g in averaged]))
    return {"auc": auc, "auc_interval": interval, "auc_by_group": areas}, spread


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
