"""Blasts: cell by cell, and on each smear, which is what a laboratory acts on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from smearline.metrics.cells import Cells
from smearline.metrics.codes import codes
from smearline.metrics.intervals import auc_interval, exact_bounds, share_by_cluster

Json = dict[str, Any]
BLAST = "BLAST"
MANY = 0.05
"""Share from which a smear counts as having many: 5 % in blood is MDS with increased blasts 2 (WHO 2022)."""


def score_blasts(cells: Cells, rng: np.random.Generator) -> Json:
    """AUC of the blast probability: cells labelled BLAST against all other labelled cells, parent-labelled included."""
    known = codes()
    positive_N = cells.label_N == known.index(BLAST)
    predicted_N = cells.predicted_N == known.types.index(BLAST)
    score_N = cells.probability_NK[:, known.types.index(BLAST)]
    return {
        "support": int(positive_N.sum()),
        "trained": BLAST in cells.trained_types,
        "auc": auc_interval(score_N, positive_N, cells.cluster_N, rng),
        "sensitivity": share_by_cluster(predicted_N[positive_N], cells.cluster_N[positive_N], rng),
        "ppv": share_by_cluster(positive_N[predicted_N], cells.cluster_N[predicted_N], rng),
    }


def score_smears(cells: Cells, rng: np.random.Generator) -> Json:
    """True and predicted blasts of each smear, as shares of its labelled cells (argmax), with exact binomial intervals.

    The shares of smears found count smears; their intervals resample patients.
    """
    known = codes()
    named = cells.take(cells.frame["smear"].notna().to_numpy(dtype=bool))
    if not len(named):
        return {"num_smears": 0}
    table = pd.DataFrame(
        {
            "site": named.frame["site"].to_numpy(),
            "smear": named.frame["smear"].to_numpy(),
            "patient": named.frame["patient"].to_numpy(),
            "cluster": np.where(named.has_patient_N, named.cluster_N, -1),
            "true": named.label_N == known.index(BLAST),
            "predicted": named.predicted_N == known.types.index(BLAST),
        }
    )
    smears = table.groupby(["site", "smear"], sort=True).agg(
        patient=("patient", "first"),
        cluster=("cluster", "max"),
        cells=("true", "size"),
        true=("true", "sum"),
        predicted=("predicted", "sum"),
    )
    smears = smears.reset_index()
    cluster_S = np.where(smears["cluster"] < 0, -1 - np.arange(len(smears)), smears["cluster"]).astype(np.int64)
    total, true, predicted = (smears[c].to_numpy(dtype=float) for c in ("cells", "true", "predicted"))

    def found(group: np.ndarray, said: np.ndarray) -> Json:
        return {"smears": int(group.sum()), **share_by_cluster(said[group], cluster_S[group], rng)}

    any_true, many_true = true > 0, true / total >= MANY
    any_said, many_said = predicted > 0, predicted / total >= MANY
    return {
        "num_smears": len(smears),
        "any_blast_found": found(any_true, any_said),
        "many_blasts_found": found(many_true, many_said),
        "no_blast_and_none_predicted": found(~any_true, ~any_said),
        "no_blast_and_few_predicted": found(~any_true, ~many_said),
        "rows": [
            {
                "site": str(site),
                "smear": str(smear),
                "patient": None if pd.isna(patient) else str(patient),
                "cells": int(n),
                "true_blasts": int(t),
                "predicted_blasts": int(p),
                "true_share": _share(t, n),
                "predicted_share": _share(p, n),
            }
            for site, smear, patient, n, t, p in zip(
                smears["site"], smears["smear"], smears["patient"], total, true, predicted, strict=True
            )
        ],
    }


def _share(hits: float, total: float) -> dict[str, float]:
    low, high = exact_bounds(hits, total)
    return {"value": hits / total, "low": float(low), "high": float(high)}
