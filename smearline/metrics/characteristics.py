"""Morphological characteristics, beside what is had without looking: the majority, the type alone, and the readers.

Many characteristics are nearly a function of the type (a basophil is granulated), so a high accuracy may only repeat
the type. The type-only predictor gives the most frequent value for the cell's *true* type; a characteristic says
something of its own only where it beats that. Of a cell labelled with a parent, the type-only predictor is told the
child that the recogniser named, so that knowing band from segmented does not pass for knowing the granules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from smearline.errors import DataError, nearest
from smearline.metrics.cells import Cells, Ints, code_indices, num_patients
from smearline.metrics.codes import codes
from smearline.metrics.intervals import (
    Floats,
    bootstrap_counts,
    f1_bounds,
    interval,
    mean_bounds,
    paired_bounds,
    proportion_bounds,
    ratio,
)
from smearline.metrics.type_scores import MIN_SUPPORT
from smearline.vocabulary import Characteristic, load

Json = dict[str, Any]
NUM_FOLDS = 5
MIN_CLUSTERS = 5
"""Fewer patients cannot show that the type is beaten: four of four agreeing has p = 0.06 in a one-sided sign test."""


@dataclass(frozen=True)
class _Scored:
    """The N cells of one characteristic: labelled in it and in the type, and of a type to which it applies."""

    cells: Cells
    true_N: Ints
    predicted_N: Ints
    type_only_N: Ints
    majority_N: Ints


def score_characteristics(cells: Cells, truth: pd.DataFrame, train: pd.DataFrame | None, seed: int) -> Json:
    """Scores of every characteristic of the vocabulary; `status` is 'tested', 'not trained' or 'not tested'.

    Args:
        cells: labelled cells.
        truth: sha256, name, value: the labels of the characteristics; other cells than those given are ignored.
        train: sha256, true_type and a column for each characteristic, of the training cells; without it (or without
            labels of a characteristic in it) the majority and the type-only predictor are cross-fitted on the
            evaluated cells in 5 folds by patient.

    Raises:
        DataError: a column is missing, a name or value is unknown, or a cell has two values of a characteristic.
    """
    labels = _labels(truth)
    return {
        c.name: _score(cells, c, labels.get(c.name), train, np.random.default_rng([seed, i]))
        for i, c in enumerate(load().characteristics.values())
    }


def _labels(truth: pd.DataFrame) -> dict[str, pd.Series]:
    missing = [c for c in ("sha256", "name", "value") if c not in truth.columns]
    if missing:
        raise DataError(f"the table of characteristic labels lacks the columns {missing}; needed: sha256, name, value")
    known = load().characteristics
    unknown = sorted(set(truth["name"]) - set(known))
    if unknown:
        raise DataError(f"'{unknown[0]}' is no characteristic; nearest: {nearest(unknown[0], known)}")
    twice = truth.duplicated(["sha256", "name"])
    if twice.any():
        row = truth[twice].iloc[0]
        raise DataError(f"cell {row['sha256']} has two labels of {row['name']}; resolve the conflict before scoring")
    return {str(n): group.set_index("sha256")["value"] for n, group in truth.groupby("name")}


def _score(
    cells: Cells, what: Characteristic, labels: pd.Series | None, train: pd.DataFrame | None, rng: np.random.Generator
) -> Json:
    trained = f"c_{what.name}" in cells.frame.columns
    readers = {"agreement": what.reader_agreement, "kappa": what.reader_kappa}
    head: Json = {"status": "not tested", "trained": trained, "support": 0, "readers": readers, "origin": what.origin}
    if labels is None:
        return head
    value_N: Ints = code_indices(cells.frame["sha256"].map(labels), what.values, what.name)
    known = codes()
    applies_R = np.asarray(known.member_RK[:, [known.types.index(t) for t in what.applies_to]].any(axis=1))
    chosen = (value_N >= 0) & applies_R[cells.label_N]
    head["labelled_where_it_does_not_apply"] = int(((value_N >= 0) & ~chosen).sum())
    if not chosen.any():
        return head
    part, true_N = cells.take(chosen), value_N[chosen]
    head |= {"support": len(part), "patients": num_patients(part), "interval_by": part.interval_by}
    if not trained:
        return head | {"status": "not trained"}
    predicted_N = code_indices(part.frame[f"c_{what.name}"], what.values, f"c_{what.name}")
    if (predicted_N < 0).any():
        raise DataError(f"{int((predicted_N < 0).sum())} labelled cells have no c_{what.name}; each needs a prediction")
    type_only_N, majority_N, source = _baselines(part, true_N, what, train, rng)
    scored = _Scored(part, true_N, predicted_N, type_only_N, majority_N)
    return head | {"status": "tested", "baselines_from": source} | _tested(scored, what, rng)


def _baselines(
    part: Cells, true_N: Ints, what: Characteristic, train: pd.DataFrame | None, rng: np.random.Generator
) -> tuple[Ints, Ints, str]:
    """The type-only and the majority prediction of each cell, and where they were learned."""
    known, num_values = codes(), len(what.values)
    type_codes = np.array([known.index(t) for t in known.types])
    told_N = np.where(known.member_RK[part.label_N, part.predicted_N], type_codes[part.predicted_N], part.label_N)
    if train is not None and what.name in train.columns:
        label, value = (
            code_indices(train["true_type"], known.codes, "true_type"),
            code_indices(train[what.name], what.values, what.name),
        )
        usable = (label >= 0) & (value >= 0)
        if usable.any():
            by_type, majority = _most_frequent(label[usable], value[usable], num_values)
            return by_type[told_N], np.full(len(part), majority), "training cells"
    clusters, cluster_N = np.unique(part.cluster_N, return_inverse=True)
    fold_N = (rng.permutation(len(clusters)) % NUM_FOLDS)[cluster_N]
    type_only_N, majority_N = np.zeros(len(part), np.int64), np.zeros(len(part), np.int64)
    for fold in range(NUM_FOLDS):
        here = fold_N == fold
        others = ~here if (~here).any() else here
        by_type, majority = _most_frequent(told_N[others], true_N[others], num_values)
        type_only_N[here], majority_N[here] = by_type[told_N[here]], majority
    return type_only_N, majority_N, f"evaluated cells, cross-fitted in {NUM_FOLDS} folds by {part.interval_by}"


def _most_frequent(label_N: Ints, value_N: Ints, num_values: int) -> tuple[Ints, int]:
    """The most frequent value of each code (of codes that overlap it, then of all, where it has none) and of all."""
    known = codes()
    R = len(known.codes)
    counts = np.bincount(label_N * num_values + value_N, minlength=R * num_values).reshape(R, num_values)
    related = (known.member_RK.astype(int) @ known.member_RK.T.astype(int) > 0) @ counts
    for fallback in (related, np.broadcast_to(counts.sum(axis=0), counts.shape)):
        counts = np.where(counts.sum(axis=1, keepdims=True) > 0, counts, fallback)
    return counts.argmax(axis=1), int(np.bincount(value_N, minlength=num_values).argmax())


def _tested(scored: _Scored, what: Characteristic, rng: np.random.Generator) -> Json:
    """Counts of (type, true value, predicted value) for model and type-only predictor, resampled together."""
    known = codes()
    num, true_N = len(what.values), scored.true_N
    present, type_N = np.unique(scored.cells.label_N, return_inverse=True)
    cube = (len(present), num, num)
    base_N = (type_N * num + true_N) * num
    right_N, guessed_N = scored.predicted_N == true_N, scored.type_only_N == true_N
    size = int(np.prod(cube))
    index_NM = np.stack(
        [base_N + scored.predicted_N, size + base_N + scored.type_only_N, 2 * size + 2 * right_N + guessed_N], axis=1
    )
    observed, drawn = bootstrap_counts(scored.cells.cluster_N, index_NM, 2 * size + 4, rng)
    counts = np.vstack([observed, drawn])
    model, type_only = (counts[:, i * size : (i + 1) * size].reshape(-1, *cube) for i in (0, 1))
    neither, only_type, only_model, both = observed[2 * size :]
    difference = ratio(_right(model) - _right(type_only), model.sum(axis=(1, 2, 3)))
    bounds = paired_bounds(only_model, only_type, neither + only_type + only_model + both)
    advantage = interval(float(difference[0]), difference[1:], bounds)
    averaged = np.flatnonzero(model[0].sum(axis=(0, 2)) >= MIN_SUPPORT)
    return {
        "values": {v: int(n) for v, n in zip(what.values, model[0].sum(axis=(0, 2)), strict=True)},
        "accuracy": _accuracy(model),
        "macro_f1": _macro_f1(model.sum(axis=1), averaged),
        "averaged": [what.values[v] for v in averaged],
        "majority_accuracy": float((scored.majority_N == true_N).mean()),
        "type_only": {
            "accuracy": _accuracy(type_only),
            "macro_f1": _macro_f1(type_only.sum(axis=1), averaged),
        },
        "advantage": advantage,
        "beats_type_only": bool(advantage["low"] > 0 and len(np.unique(scored.cells.cluster_N)) >= MIN_CLUSTERS),
        "within_type": {
            known.codes[r]: {
                "support": int(model[0, t].sum()),
                "accuracy": _accuracy(model[:, t : t + 1]),
                "type_only_accuracy": float(_right(type_only[:1, t : t + 1])[0] / model[0, t].sum()),
                "sensitivity": dict(
                    zip(what.values, ratio(np.diag(model[0, t]), model[0, t].sum(axis=1)), strict=True)
                ),
            }
            for t, r in enumerate(present)
        },
    }


def _right(cube: Floats) -> Floats:
    return np.asarray(np.einsum("btvv->b", cube))


def _accuracy(cube: Floats) -> dict[str, float]:
    hits, total = _right(cube), cube.sum(axis=(1, 2, 3))
    low, high = proportion_bounds(hits[0], total[0])
    return interval(float(hits[0] / total[0]), ratio(hits[1:], total[1:]), (float(low), float(high)))


def _macro_f1(confusion: Floats, averaged: Ints) -> dict[str, float]:
    """Mean over the values with at least 20 cells of F1 = 2 TP / (2 TP + FP + FN)."""
    if not len(averaged):
        return interval(np.nan, np.empty(0), (np.nan, np.nan))
    hits = np.einsum("bvv->bv", confusion)[:, averaged]
    either = (confusion.sum(axis=1) + confusion.sum(axis=2))[:, averaged]
    f1 = ratio(2 * hits, either)
    low, high = f1_bounds(f1[0], either[0] - hits[0])
    present = np.isfinite(f1)
    means = ratio(np.where(present, f1, 0).sum(axis=1), present.sum(axis=1))
    return interval(float(means[0]), means[1:], mean_bounds(f1[0], (low, high)))
