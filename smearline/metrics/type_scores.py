"""How well the types are named: per class, averaged, at the level of the parents, the confusions, the probabilities.

Every figure of naming is a ratio of two weighted sums over the confusion counts (rows: labels, parents included;
columns: predictions), so the same weights give the value and all its bootstrap replicates.

How a parent label counts. A cell labelled only 'neutrophil' (NEUT)
- is right when the predicted type is a child of NEUT, and forms the class row NEUT: its sensitivity is over the cells
  labelled NEUT; its PPV is that of the collapsed prediction (of all cells predicted as a child of NEUT, whatever their
  label's level, the share that are neutrophils);
- never enters the sensitivity, PPV or one-against-rest accuracy of NEUT_SEG and NEUT_BAND: it decides nothing there;
- counts as a false positive of any other type it was predicted as: a neutrophil is certainly no monocyte;
- is tolerated only where the predicted type neighbours every child, so that a parent label cannot flatter.
"""

from typing import Any

import numpy as np
import pandas as pd

from smearline.metrics import intervals
from smearline.metrics.cells import Bools, codes, interval_by, num_patients, probabilities
from smearline.metrics.intervals import Floats
from smearline.vocabulary import load

Json = dict[str, Any]
MIN_SUPPORT = 20  # classes with fewer test cells are listed, not averaged
NUM_BINS = 15
LEAST_PROBABILITY = 1e-12  # the logarithm is cut here, so that one impossible answer does not make the mean infinite


def score_types(cells: pd.DataFrame, rng: np.random.Generator) -> Json:
    """Scores of labelled cells: {'types', 'parents', 'confusion'}; estimates are {value, low, high}.

    `types` has the averages, `averaged` (the classes with at least 20 cells that enter balanced accuracy and macro F1;
    accuracy is over every labelled cell) and `per_class`. `parents` has the parents of which a cell is labelled.
    """
    known = codes()
    R, K = known.member_RK.shape
    index_N = (cells["label"] * K + cells["predicted"]).to_numpy()
    counts = intervals.bootstrap_counts(cells["cluster"], index_N[:, None], R * K, rng)
    confusion_RK = counts[0].reshape(R, K)
    support_R = confusion_RK.sum(axis=1)

    def weighed(hits: Any, total: Any) -> tuple[Floats, Floats]:
        """For each class r the cells [q, k] that its weights choose, B x R: the hits among the total, and the total."""
        chosen = (np.broadcast_to(w, (R, R, K)).reshape(R, -1).T.astype(float) for w in (hits & total, total))
        hits_BR, total_BR = (counts @ w for w in chosen)
        return hits_BR, total_BR

    own = np.eye(R, dtype=bool)[:, :, None]
    member, tolerated = known.member_RK[:, None, :], known.tolerated_RK[:, None, :]
    within, decidable = known.within_RR[:, :, None], known.decidable_RR[:, :, None]
    shares = {
        "sensitivity": weighed(member, own),
        "ppv": weighed(within, decidable & member),
        "tolerant_sensitivity": weighed(tolerated, own),
        "tolerant_ppv": weighed(within | known.tolerated_RK[None], decidable & member),
        "one_vs_rest_accuracy": weighed(within == member, decidable),
    }
    (hits, total), (_, said) = shares["sensitivity"], shares["ppv"]
    sensitivity, ppv = intervals.ratio(hits, total), np.nan_to_num(intervals.ratio(*shares["ppv"]))
    # Harmonic mean; 0 where a class with cells is never predicted or never right.
    f1 = np.where(sensitivity + ppv > 0, intervals.ratio(2 * sensitivity * ppv, sensitivity + ppv), sensitivity * 0)
    bounds = np.array(
        [intervals.proportion_bounds(hits[0], total[0]), intervals.f1_bounds(f1[0], total[0] + said[0] - hits[0])]
    )
    averaged = np.flatnonzero(support_R >= MIN_SUPPORT)

    def estimates(r: int) -> Json:
        found = {name: intervals.proportion(hits[:, r], total[:, r]) for name, (hits, total) in shares.items()}
        both = {name: found.pop(name) for name in ("sensitivity", "ppv")}
        return both | {"f1": intervals.interval(f1[:, r], *bounds[1, :, r])} | found

    collapsed = weighed(member, within)
    parents = [(p, known.codes.index(p)) for p in known.codes if p in load().parents]
    rows = np.flatnonzero(support_R).tolist()
    columns = np.flatnonzero(known.member_RK[rows].any(axis=0) | (confusion_RK.sum(axis=0) > 0))
    return {
        "types": {
            "cells": len(cells),
            "patients": num_patients(cells),
            "interval_by": interval_by(cells),
            "accuracy": intervals.proportion(counts @ known.member_RK.ravel(), counts.sum(axis=1)),
            "tolerant_accuracy": intervals.proportion(counts @ known.tolerated_RK.ravel(), counts.sum(axis=1)),
            "balanced_accuracy": intervals.mean(sensitivity[:, averaged], bounds[0][:, averaged]),
            "macro_f1": intervals.mean(f1[:, averaged], bounds[1][:, averaged]),
            "averaged": [known.codes[r] for r in averaged],
            "per_class": {
                known.codes[r]: {
                    "support": int(support_R[r]),
                    "patients": num_patients(cells[cells["label"] == r]),
                    "listed_only": bool(support_R[r] < MIN_SUPPORT),
                    **estimates(r),
                }
                for r in rows
            },
        },
        "parents": {
            p: {
                "support": int(collapsed[1][0, r]),
                "patients": num_patients(cells[known.within_RR[r][cells["label"]]]),
                "sensitivity": intervals.proportion(*(c[:, r] for c in collapsed)),
                "ppv": intervals.proportion(*(c[:, r] for c in shares["ppv"])),
            }
            for p, r in parents
            if collapsed[1][0, r]
        },
        "confusion": {
            "true": [known.codes[r] for r in rows],
            "predicted": [known.types[k] for k in columns],
            "counts": confusion_RK[rows][:, columns].astype(int).tolist(),
        },
    }


def score_calibration(cells: pd.DataFrame) -> Json:
    """Calibration of labelled cells; a parent-labelled cell is judged on the probabilities collapsed to its parent.

    - `ece`: `calibration_error` in 15 bins, confidence being the predicted type's probability; where the site labels by one of its
      parents, that parent's, right or wrong, but for a cell labelled one of the parent's children.
    - `brier`: mean over cells of the sum over types of (probability - truth)^2 (Brier 1950). Range 0..2.
    - `nll`: mean of -ln of the probability of the label, for a parent the sum of its children's.
    - `bins`: lowest confidence first: cells, confidence (mean), accuracy.
    """
    member_NK, probability_NK = codes().member_RK[cells["label"]], probabilities(cells)
    rows, predicted_N = np.arange(len(cells)), cells["predicted"].to_numpy()
    inside_NK = probability_NK * member_NK
    inside_N, right_N = inside_NK.sum(axis=1), member_NK[rows, predicted_N]
    confidence_N = probability_NK[rows, predicted_N]
    for p in (r for r, code in enumerate(codes().codes) if code in load().parents):
        by_parent_N = (cells["label"] == p).groupby(cells["site"]).transform("any").to_numpy()
        finer_N = codes().within_RR[p][cells["label"]] & (cells["label"] != p).to_numpy()
        collapsed_N = by_parent_N & codes().member_RK[p][predicted_N] & ~finer_N
        sums_N = probability_NK @ codes().member_RK[p]
        confidence_N = np.where(collapsed_N, np.maximum(confidence_N, sums_N), confidence_N)
    outside_N = (probability_NK**2).sum(axis=1) - (inside_NK**2).sum(axis=1)
    ece, bins = calibration_error(confidence_N, right_N, NUM_BINS)
    return {
        "cells": len(cells),
        "ece": ece,
        "brier": float((outside_N + (1 - inside_N) ** 2).mean()),
        "nll": float(-np.log(np.maximum(inside_N, LEAST_PROBABILITY)).mean()),
        "bins": bins,
    }


def calibration_error(confidence_N: Floats, right_N: Bools, num_bins: int) -> tuple[float, list[Json]]:
    """Sum over bins of (cells in bin / cells) x |share right - mean confidence| (Naeini 2015, AAAI; Guo 2017, ICML, eq. 3).

    The bins are of equal count (Nixon 2019, CVPR workshops) because most confidences lie near 1. Range 0..1, less is better.

    Returns:
        The error, and the bins, lowest confidence first: cells, confidence (mean), accuracy.
    """
    bins = [
        {"cells": len(b), "confidence": float(confidence_N[b].mean()), "accuracy": float(right_N[b].mean())}
        for b in np.array_split(np.argsort(confidence_N, kind="stable"), min(num_bins, len(confidence_N)))
    ]
    return sum(b["cells"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(confidence_N), bins
