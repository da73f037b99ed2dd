"""Blasts: cell by cell, and on each smear, which is what a laboratory acts on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from smearline.metrics.cells import codes, probabilities, trained_types
from smearline.metrics.intervals import auc, exact_bounds, share

Json = dict[str, Any]
BLAST = "BLAST"
MANY = 0.05  # share from which a smear has many: 5 % in blood is MDS with increased blasts 2 (WHO 2022)


def score_blasts(cells: pd.DataFrame, rng: np.random.Generator) -> Json:
    """AUC of the blast probability: cells labelled BLAST against all other labelled cells, parent-labelled included."""
    column = codes().types.index(BLAST)
    true_N = (cells["label"] == codes().codes.index(BLAST)).to_numpy()
    said_N, cluster_N = (cells["predicted"] == column).to_numpy(), cells["cluster"].to_numpy()
    return {
        "support": int(true_N.sum()),
        "trained": BLAST in trained_types(cells),
        "auc": auc(probabilities(cells)[:, column], true_N, cluster_N, rng),
        "sensitivity": share(said_N[true_N], cluster_N[true_N], rng),
        "ppv": share(true_N[said_N], cluster_N[said_N], rng),
    }


def score_smears(cells: pd.DataFrame, rng: np.random.Generator) -> Json:
    """True and predicted blasts of each smear, as shares of its labelled cells (argmax), with exact binomial intervals.

    The shares of smears found count smears; their intervals resample patients.
    """
    named = cells[cells["smear"].notna()]
    if named.empty:
        return {"num_smears": 0}
    smears = (
        named.assign(
            true=named["label"] == codes().codes.index(BLAST),
            said=named["predicted"] == codes().types.index(BLAST),
            cluster=named["cluster"].where(named["patient"].notna(), -1 - named["cluster"]),
        )
        .groupby(["site", "smear"])
        .agg(
            patient=("patient", "first"),
            cells=("true", "size"),
            true_blasts=("true", "sum"),
            predicted_blasts=("said", "sum"),
            cluster=("cluster", "max"),
        )
        .reset_index()
    )
    total_S = smears["cells"]
    shares = {}
    for whose in ("true", "predicted"):
        hits_S = smears[f"{whose}_blasts"]
        ends = zip(hits_S / total_S, *exact_bounds(hits_S, total_S), strict=True)
        shares[f"{whose}_share"] = [dict(zip(("value", "low", "high"), e, strict=True)) for e in ends]
    any_true, any_said = smears["true_blasts"] > 0, smears["predicted_blasts"] > 0
    many_true, many_said = (smears[f"{w}_blasts"] / total_S >= MANY for w in ("true", "predicted"))

    def found(group: pd.Series, said: pd.Series) -> Json:
        return {"smears": int(group.sum()), **share(said[group], smears.loc[group, "cluster"], rng)}

    rows = smears.drop(columns="cluster").assign(**shares).astype(object)
    return {
        "num_smears": len(smears),
        "any_blast_found": found(any_true, any_said),
        "many_blasts_found": found(many_true, many_said),
        "no_blast_and_none_predicted": found(~any_true, ~any_said),
        "no_blast_and_few_predicted": found(~any_true, ~many_said),
        "rows": rows.where(rows.notna(), None).to_dict("records"),
    }
