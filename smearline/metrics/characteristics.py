"""Morphological characteristics, beside what is had without looking: the majority, the type alone, and the readers.

Many characteristics are nearly a function of the type (a basophil is granulated), so a high accuracy may only repeat
the type. The type-only predictor gives the most frequent value for the cell's *true* type; a characteristic says
something of its own only where it beats that. Of a cell labelled with a parent, the type-only predictor is told the
child that the recogniser named, so that knowing band from segmented does not pass for knowing the granules.
"""

import math
from typing import Any

import numpy as np
import pandas as pd

from smearline.errors import DataError, nearest
from smearline.metrics import intervals
from smearline.metrics.cells import Ints, codes, indices, interval_by, num_patients
from smearline.metrics.intervals import Estimate, Floats
from smearline.metrics.type_scores import MIN_SUPPORT
from smearline.vocabulary import Characteristic, load

Json = dict[str, Any]
PREDICTORS = ("said", "type_only")
# Fewer patients (smears, or cells, where no patient is known) cannot show that the type is beaten: four of four agreeing has
# p = 0.06 in a one-sided sign test.
MIN_CLUSTERS = 5


def score_characteristics(cells: pd.DataFrame, truth: pd.DataFrame, train: pd.DataFrame, seed: int) -> Json:
    """Scores of every characteristic of the vocabulary; `status` is 'tested', 'not trained' or 'not tested'.

    Args:
        cells: labelled cells.
        truth: sha256, name, value: the labels of the characteristics; other cells than those given are ignored.
        train: true_type and a column for each trained characteristic, of the training cells: what the majority and the type-only
            predictor know.

    Raises:
        DataError: a column is missing, a name or value is unknown, or a cell has two values of a characteristic.
    """
    missing = [c for c in ("sha256", "name", "value") if c not in truth.columns]
    if missing:
        raise DataError(f"the table of characteristic labels lacks the columns {missing}; needed: sha256, name, value")
    known = load().characteristics
    for unknown in sorted(set(truth["name"]) - set(known)):
        raise DataError(f"'{unknown}' is no characteristic; nearest: {nearest(unknown, known)}")
    twice = truth[truth.duplicated(["sha256", "name"])]
    if len(twice):
        row = twice.iloc[0]
        raise DataError(f"cell {row['sha256']} has two labels of {row['name']}; resolve the conflict before scoring")
    labels = {name: group.set_index("sha256")["value"] for name, group in truth.groupby("name")}
    return {
        name: _score(cells, what, labels.get(name), train, [seed, number])
        for number, (name, what) in enumerate(known.items())
    }


def _score(
    cells: pd.DataFrame, what: Characteristic, labels: pd.Series | None, train: pd.DataFrame, seed: list[int]
) -> Json:
    trained, rng = f"c_{what.name}" in cells.columns, np.random.default_rng(seed)
    head: Json = {"status": "not tested", "trained": trained, "support": 0}
    head |= {"readers": what.readers, "origin": what.origin}
    if labels is None:
        return head
    value_N = indices(cells["sha256"].map(labels), what.values, what.name)
    of_types = np.array([t in what.applies_to for t in codes().types])
    chosen = (value_N >= 0) & (codes().member_RK[cells["label"]] & of_types).any(axis=1)
    head["labelled_where_it_does_not_apply"] = int(((value_N >= 0) & ~chosen).sum())
    if not chosen.any():
        return head
    part = cells[chosen].assign(true=value_N[chosen])
    head |= {"support": len(part), "patients": num_patients(part), "interval_by": interval_by(part)}
    if not trained:
        return head | {"status": "not trained"}
    part["said"] = indices(part[f"c_{what.name}"], what.values, f"c_{what.name}")
    if (part["said"] < 0).any():
        raise DataError(f"{(part['said'] < 0).sum()} labelled cells have no c_{what.name}; each needs a prediction")
    part["type_only"], part["majority"] = _baselines(part, what, train)
    return head | {"status": "tested"} | _tested(part, what, rng)


def _baselines(part: pd.DataFrame, what: Characteristic, train: pd.DataFrame) -> tuple[Ints, int]:
    """The type-only prediction of each cell and the majority, learned from the training cells of types to which it applies."""
    known, label_N, predicted_N = codes(), part["label"].to_numpy(), part["predicted"].to_numpy()
    named_N = np.array([known.codes.index(t) for t in known.types])[predicted_N]
    told_N = np.where(known.member_RK[label_N, predicted_N], named_N, label_N)
    label = indices(train["true_type"], known.codes, "true_type")
    value = indices(train[what.name], what.values, what.name) if what.name in train else np.full(len(train), -1)
    elsewhere = (label >= 0) & ~(known.member_RK[label] & np.isin(known.types, what.applies_to)).any(axis=1)
    value = np.where(elsewhere, -1, value)
    if not (value >= 0).any():
        raise DataError(f"no training cell has a value of {what.name}, for which the model has answers")
    by_type, majority = _most_frequent(label[value >= 0], value[value >= 0], len(what.values))
    return by_type[told_N], majority


def _most_frequent(label_N: Ints, value_N: Ints, num_values: int) -> tuple[Ints, int]:
    """The most frequent value of each code (of codes that overlap it, then of all, where it has none) and of all, untyped cells
    too."""
    member = codes().member_RK.astype(int)
    counts = np.zeros((len(member), num_values), int)
    np.add.at(counts, (label_N[label_N >= 0], value_N[label_N >= 0]), 1)
    overall = np.bincount(value_N, minlength=num_values)
    for fallback in ((member @ member.T > 0) @ counts, overall[None]):
        counts = np.where(counts.sum(axis=1, keepdims=True) > 0, counts, fallback)
    return counts.argmax(axis=1), int(overall.argmax())


def _tested(part: pd.DataFrame, what: Characteristic, rng: np.random.Generator) -> Json:
    """Counts of (type, true value, predicted value) for model and type-only predictor, resampled together."""
    present, type_N = np.unique(part["label"], return_inverse=True)
    shape = (2, len(present), len(what.values), len(what.values))
    places = [np.ravel_multi_index((i, type_N, part["true"], part[by]), shape) for i, by in enumerate(PREDICTORS)]
    counts = intervals.bootstrap_counts(part["cluster"], np.stack(places, axis=1), math.prod(shape), rng)
    model, type_only = np.moveaxis(counts.reshape(-1, *shape), 1, 0)
    right, guessed = part["said"] == part["true"], part["type_only"] == part["true"]
    difference = intervals.ratio(_right(model) - _right(type_only), model.sum(axis=(1, 2, 3)))
    advantage = intervals.paired_difference(difference, (right & ~guessed).sum(), (guessed & ~right).sum(), len(part))
    support_V = model[0].sum(axis=(0, 2))
    averaged = np.flatnonzero(support_V >= MIN_SUPPORT)
    return {
        "values": {v: int(n) for v, n in zip(what.values, support_V, strict=True)},
        "accuracy": _accuracy(model),
        "macro_f1": _macro_f1(model, averaged),
        "averaged": [what.values[v] for v in averaged],
        "majority_accuracy": float((part["majority"] == part["true"]).mean()),
        "type_only": {"accuracy": _accuracy(type_only), "macro_f1": _macro_f1(type_only, averaged)},
        "advantage": advantage,
        "beats_type_only": bool(advantage["low"] > 0 and part["cluster"].nunique() >= MIN_CLUSTERS),
        "within_type": {
            codes().codes[r]: {
                "support": int(own.sum()),
                "accuracy": _accuracy(model[:, t : t + 1]),
                "type_only_accuracy": float(_right(type_only[:1, t : t + 1])[0] / own.sum()),
                "sensitivity": dict(zip(what.values, intervals.ratio(np.diag(own), own.sum(axis=1)), strict=True)),
            }
            for t, (r, own) in enumerate(zip(present, model[0], strict=True))
        },
    }


def _right(cube: Floats) -> Floats:
    return np.asarray(np.einsum("btvv->b", cube))


def _accuracy(cube: Floats) -> Estimate:
    return intervals.proportion(_right(cube), cube.sum(axis=(1, 2, 3)))


def _macro_f1(cube: Floats, averaged: Ints) -> Estimate:
    """Mean over the values with at least 20 cells of F1 = 2 TP / (2 TP + FP + FN)."""
    confusion = cube.sum(axis=1)
    hits = np.einsum("bvv->bv", confusion)[:, averaged]
    either = (confusion.sum(axis=1) + confusion.sum(axis=2))[:, averaged]
    f1 = intervals.ratio(2 * hits, either)
    return intervals.mean(f1, intervals.f1_bounds(f1[0], either[0] - hits[0]))
