"""Whether a probability means what it says."""

from __future__ import annotations

from typing import Any

import numpy as np

from smearline.metrics.cells import Cells
from smearline.metrics.codes import codes

NUM_BINS = 15
LEAST_PROBABILITY = 1e-12
"""Below it the logarithm is cut, so that one impossible answer does not make the mean infinite."""


def score_calibration(cells: Cells) -> dict[str, Any]:
    """Calibration of labelled cells; a parent-labelled cell is judged on the probabilities collapsed to its parent.

    - `ece`: sum over bins of (cells in bin / cells) x |share right - mean confidence|, confidence being the predicted
      type's probability (Naeini 2015, AAAI; Guo 2017, ICML, eq. 3), in 15 bins of equal count (Nixon 2019, CVPR
      workshops) because most confidences lie near 1. Range 0..1, less is better.
    - `brier`: mean over cells of the sum over types of (probability - truth)^2 (Brier 1950). Range 0..2.
    - `nll`: mean of -ln of the probability of the label, for a parent the sum of its children's.
    - `bins`: lowest confidence first: cells, confidence (mean), accuracy.
    """
    known = codes()
    rows = np.arange(len(cells))
    inside_NK = cells.probability_NK * known.member_RK[cells.label_N]
    inside_N = inside_NK.sum(axis=1)
    right_N = known.member_RK[cells.label_N, cells.predicted_N]
    confidence_N = np.where(right_N, inside_N, cells.probability_NK[rows, cells.predicted_N])
    outside_N = (cells.probability_NK**2).sum(axis=1) - (inside_NK**2).sum(axis=1)

    order = np.argsort(confidence_N, kind="stable")
    bins = [
        {"cells": len(b), "confidence": float(confidence_N[b].mean()), "accuracy": float(right_N[b].mean())}
        for b in np.array_split(order, min(NUM_BINS, len(cells)))
    ]
    return {
        "cells": len(cells),
        "ece": sum(b["cells"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(cells),
        "brier": float((outside_N + (1 - inside_N) ** 2).mean()),
        "nll": float(-np.log(np.maximum(inside_N, LEAST_PROBABILITY)).mean()),
        "bins": bins,
    }
