"""How well the types are named: per class, averaged, at the level of the parents, and the confusions.

Every figure here is a ratio of two weighted sums over the confusion counts (rows: labels, parents included; columns:
predictions), so the same weights give the value and all its bootstrap replicates.

How a parent label counts. A cell labelled only 'neutrophil' (NEUT)
- is right when the predicted type is a child of NEUT, and forms the class row NEUT: its sensitivity is over the cells
  labelled NEUT; its PPV is that of the collapsed prediction (of all cells predicted as a child of NEUT, whatever their
  label's level, the share that are neutrophils);
- never enters the sensitivity, PPV or one-against-rest accuracy of NEUT_SEG and NEUT_BAND: it decides nothing there;
- counts as a false positive of any other type it was predicted as: a neutrophil is certainly no monocyte;
- is tolerated only where the predicted type neighbours every child, so that a parent label cannot flatter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smearline.metrics.cells import Cells, num_patients
from smearline.metrics.codes import codes
from smearline.metrics.intervals import (
    Estimate,
    Floats,
    bootstrap_counts,
    f1_bounds,
    interval,
    mean_bounds,
    proportion_bounds,
    ratio,
)

Json = dict[str, Any]
MIN_SUPPORT = 20
"""Classes with fewer test cells are listed, not averaged."""


def score_types(cells: Cells, rng: np.random.Generator) -> Json:
    """Scores of labelled cells: {'types', 'parents', 'confusion'}; estimates are {value, low, high}.

    `types` has the averages, `averaged` (the classes with at least 20 cells that enter balanced accuracy and macro F1;
    accuracy is over every labelled cell) and `per_class`. `parents` has the parents of which a cell is labelled.
    """
    known = codes()
    R, K = known.member_RK.shape
    flat_N = cells.label_N * K + cells.predicted_N
    observed, drawn = bootstrap_counts(cells.cluster_N, flat_N[:, None], R * K, rng)
    counts = np.vstack([observed, drawn])  # row 0 is the value, the others its replicates
    support_R = observed.reshape(R, K).sum(axis=1)

    eye = np.eye(R, dtype=bool)
    sensitivity = _ratio(counts, eye, known.member_RK)
    ppv = _ppv(counts, tolerant=False)
    averaged = np.flatnonzero(support_R >= MIN_SUPPORT)
    sens = ratio(*sensitivity)
    f1 = _f1(sens, ratio(*ppv))
    union = sensitivity[1][0] + ppv[1][0] - sensitivity[0][0]
    tables: dict[str, list[Estimate]] = {
        "sensitivity": _estimates(*sensitivity),
        "ppv": _estimates(*ppv),
        "f1": _estimates_of(f1, f1_bounds(f1[0], union)),
        "tolerant_sensitivity": _estimates(*_ratio(counts, eye, known.tolerated_RK)),
        "tolerant_ppv": _estimates(*_ppv(counts, tolerant=True)),
        "one_vs_rest_accuracy": _estimates(*_one_vs_rest(counts)),
    }
    sens_bounds = proportion_bounds(sensitivity[0][0], sensitivity[1][0])
    return {
        "types": {
            "cells": len(cells),
            "patients": num_patients(cells),
            "interval_by": cells.interval_by,
            "accuracy": _accuracy(counts, known.member_RK),
            "tolerant_accuracy": _accuracy(counts, known.tolerated_RK),
            "balanced_accuracy": _mean(sens, sens_bounds, averaged),
            "macro_f1": _mean(f1, f1_bounds(f1[0], union), averaged),
            "averaged": [known.codes[r] for r in averaged],
            "per_class": {
                code: {
                    "support": int(support_R[r]),
                    "patients": num_patients(cells.take(cells.label_N == r)),
                    "listed_only": bool(support_R[r] < MIN_SUPPORT),
                    **{name: table[r] for name, table in tables.items()},
                }
                for r, code in enumerate(known.codes)
                if support_R[r]
            },
        },
        "parents": _parents(cells, counts),
        "confusion": _confusion(observed.reshape(R, K)),
    }


def _ratio(counts: Floats, rows_RR: NDArray[np.bool_], hits_RK: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """For each class r, over the cells labelled as in rows_RR[r]: how many were predicted as in hits_RK[r], and all."""
    total = rows_RR[:, :, None] & np.ones_like(hits_RK)[:, None, :]
    return _weigh(counts, total & hits_RK[:, None, :]), _weigh(counts, total)


def _ppv(counts: Floats, *, tolerant: bool) -> tuple[Floats, Floats]:
    known = codes()
    said = known.decidable_RR[:, :, None] & known.member_RK[:, None, :]
    right = known.within_RR[:, :, None] | (known.tolerated_RK[None] if tolerant else False)
    return _weigh(counts, said & right), _weigh(counts, said)


def _one_vs_rest(counts: Floats) -> tuple[Floats, Floats]:
    known = codes()
    decidable = known.decidable_RR[:, :, None] & np.ones_like(known.member_RK)[:, None, :]
    right = known.within_RR[:, :, None] == known.member_RK[:, None, :]
    return _weigh(counts, decidable & right), _weigh(counts, decidable)


def _weigh(counts: Floats, weights_RRK: NDArray[np.bool_]) -> Floats:
    """counts (B, R*K) to (B, R): for each class the sum of the confusion counts its weights choose."""
    return np.asarray(counts @ weights_RRK.reshape(len(weights_RRK), -1).T.astype(float))


def _f1(sensitivity: Floats, ppv: Floats) -> Floats:
    """Harmonic mean; 0 where a class with cells is never predicted or never right."""
    ppv = np.where(np.isnan(ppv), 0.0, ppv)
    return np.where(sensitivity + ppv > 0, ratio(2 * sensitivity * ppv, sensitivity + ppv), sensitivity * 0)


def _estimates(hits: Floats, total: Floats) -> list[Estimate]:
    return _estimates_of(ratio(hits, total), proportion_bounds(hits[0], total[0]))


def _estimates_of(values: Floats, bounds: tuple[Floats, Floats]) -> list[Estimate]:
    columns = range(values.shape[1])
    return [interval(float(values[0, r]), values[1:, r], (float(bounds[0][r]), float(bounds[1][r]))) for r in columns]


def _accuracy(counts: Floats, hits_RK: NDArray[np.bool_]) -> Estimate:
    return _estimates(counts @ hits_RK.reshape(-1, 1).astype(float), counts.sum(axis=1, keepdims=True))[0]


def _mean(values: Floats, bounds: tuple[Floats, Floats], classes: NDArray[np.int64]) -> Estimate:
    """The mean over classes; a resample in which one of them has no cell averages the others."""
    if not len(classes):
        return interval(np.nan, np.empty(0), (np.nan, np.nan))
    present = np.isfinite(values[:, classes])
    means = ratio(np.where(present, values[:, classes], 0).sum(axis=1), present.sum(axis=1))
    return interval(
        float(means[0]), means[1:], mean_bounds(values[0, classes], (bounds[0][classes], bounds[1][classes]))
    )


def _parents(cells: Cells, counts: Floats) -> Json:
    """Sensitivity and PPV after collapsing labels and predictions to each parent."""
    known = codes()
    sensitivity, ppv = _ratio(counts, known.within_RR, known.member_RK), _ppv(counts, tolerant=False)
    sens, precision = _estimates(*sensitivity), _estimates(*ppv)
    rows = [(p, known.index(p)) for p in known.parents]
    return {
        p: {
            "support": int(sensitivity[1][0, r]),
            "patients": num_patients(cells.take(np.isin(cells.label_N, np.flatnonzero(known.within_RR[r])))),
            "sensitivity": sens[r],
            "ppv": precision[r],
        }
        for p, r in rows
        if sensitivity[1][0, r]
    }


def _confusion(counts_RK: Floats) -> Json:
    known = codes()
    rows = np.flatnonzero(counts_RK.sum(axis=1))
    shown = known.member_RK[rows].any(axis=0) | (counts_RK.sum(axis=0) > 0)
    columns = np.flatnonzero(shown)
    return {
        "true": [known.codes[r] for r in rows],
        "predicted": [known.types[k] for k in columns],
        "counts": counts_RK[np.ix_(rows, columns)].astype(int).tolist(),
    }
