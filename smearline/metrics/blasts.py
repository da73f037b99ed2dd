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


PSEUDO_CELLS = 100


def false_alarm_share(site_N: pd.Series, smear_N: pd.Series, true_N: pd.Series, said_N: pd.Series) -> float | None:
    """The largest share of cells called blasts on a smear without a labelled one: a smear with more is flagged.

    Of smears with `PSEUDO_CELLS` / 2 cells and more; cells of a site without smears are cut into pseudo-smears. To be learned on
    patients that do not judge it. None where every smear has blasts.

    Args:
        true_N, said_N: whether a cell is labelled, and called, a blast.
    """
    smear = smear_N.where(
        smear_N.notna(), "pseudo-smear " + (site_N.groupby(site_N).cumcount() // PSEUDO_CELLS).astype(str)
    )
    free = pd.DataFrame({"true": true_N, "said": said_N}).groupby([site_N, smear]).agg(["sum", "size"])
    free = free[(free["true", "sum"] == 0) & (free["true", "size"] >= PSEUDO_CELLS // 2)]
    return float((free["said", "sum"] / free["said", "size"]).max()) if len(free) else None


def score_pseudo_smears(cells: pd.DataFrame, flag_above: float) -> Json:
    """Of sites without smears: cells without a blast's label, cut into pseudo-smears, and how many of them are flagged.

    Another laboratory's cells of one label each: they say how often it calls blasts where there are none, no specificity."""
    found: Json = {}
    free = cells[cells["smear"].isna() & (cells["label"] != codes().codes.index(BLAST))]
    for site, part in free.groupby("site"):
        said = (part["predicted"] == codes().types.index(BLAST)).to_numpy()
        whole = len(said) // PSEUDO_CELLS * PSEUDO_CELLS
        if whole:
            share_S = said[:whole].reshape(-1, PSEUDO_CELLS).mean(axis=1)
            found[str(site)] = {"smears": len(share_S), "flagged": int((share_S > flag_above).sum())}
    return found


def score_smears(cells: pd.DataFrame, rng: np.random.Generator, flag_above: float | None = None) -> Json:
    """True and predicted blasts of each smear, as shares of its labelled cells (argmax), with exact binomial intervals.

    The shares of smears found count smears; their intervals resample patients.

    Args:
        flag_above: the model's own limit (`false_alarm_share`); with it the smears flagged are counted as well.
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

    flagged: Json = {}
    if flag_above is not None:
        above = smears["predicted_blasts"] / total_S > flag_above
        which = {"any_blast": any_true, "many_blasts": many_true, "no_blast": ~any_true}
        flagged = {
            "flag_above": flag_above,
            **{f"{name}_flagged": found(group, above) for name, group in which.items()},
        }
    rows = smears.drop(columns="cluster").assign(**shares).astype(object)
    return {
        "num_smears": len(smears),
        "any_blast_found": found(any_true, any_said),
        "many_blasts_found": found(many_true, many_said),
        "no_blast_and_none_predicted": found(~any_true, ~any_said),
        "no_blast_and_few_predicted": found(~any_true, ~many_said),
        **flagged,
        "rows": rows.where(rows.notna(), None).to_dict("records"),
    }
