"""What the recogniser may be sure of, measured: risk against coverage, abstention, and what its sets of types reach.

The sets, the abstention and the distance are what smearline/confidence.py learned on validation cells; here they meet cells of
other patients and other sites, where nothing is promised.
"""

from typing import Any

import numpy as np
import pandas as pd

from smearline.confidence import risk_by_coverage
from smearline.metrics.cells import codes, probabilities
from smearline.metrics.intervals import share

Json = dict[str, Any]
POINTS = 50


def score_sureness(cells: pd.DataFrame, rng: np.random.Generator) -> Json:
    """Of labelled cells; estimates are {value, low, high}.

    - `curve`: share answered against share wrong among them, surest first (at most 50 points); `area`: its mean risk.
    - where the model carries a confidence: `named` (share of cells), `accuracy_named`, `accuracy_unidentified` (of the names
      that were withheld), `unlike` (share of cells farther from the training's than is typical), `set_size` (mean number of
      types) and `coverage`: the share of cells whose set holds the label (a parent's, one of its children), in all and by type.
    """
    rows, cluster_N = np.arange(len(cells)), cells["cluster"].to_numpy()
    member_NK, probability_NK = codes().member_RK[cells["label"]], probabilities(cells)
    right_N = member_NK[rows, cells["predicted"]]
    answered, risk = risk_by_coverage(probability_NK.max(axis=1), right_N)
    shown = np.unique(np.linspace(0, len(cells) - 1, min(POINTS, len(cells))).round().astype(int))
    found: Json = {
        "area": float(risk.mean()),
        "curve": [{"answered": float(answered[i]), "wrong": float(risk[i])} for i in shown],
    }
    if "named" not in cells:
        return found
    named_N, unlike_N = cells["named"].to_numpy(bool), cells["unlike"].to_numpy(float) > 1
    sets = [frozenset(s.split()) for s in cells["type_set"].fillna("")]
    inside_NK = np.array([[t in s for t in codes().types] for s in sets])
    held_N = (inside_NK & member_NK).any(axis=1)
    by_type = {
        codes().codes[r]: {"cells": int(own.sum()), **share(held_N[own], cluster_N[own], rng)}
        for r in np.unique(cells["label"])
        if (own := (cells["label"] == r).to_numpy()).any()
    }
    return found | {
        "named": share(named_N, cluster_N, rng),
        "accuracy_named": share(right_N[named_N], cluster_N[named_N], rng),
        "accuracy_unidentified": share(right_N[~named_N], cluster_N[~named_N], rng),
        "unlike": share(unlike_N, cluster_N, rng),
        "set_size": float(inside_NK.sum(axis=1).mean()),
        "coverage": share(held_N, cluster_N, rng),
        "coverage_by_type": by_type,
    }
