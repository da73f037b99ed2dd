"""Blasts: cell by cell, and on each smear, which is what a laboratory acts on."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from smearline.metrics.cells import codes, probabilities, trained_types
from smearline.metrics.intervals import auc, exact_bounds, share

Json = dict[str, Any]
BLAST = "BLAST"
MANY = 0.05  # share from which a smear has many: 5 % in blood is MDS with increased blasts 2 (WHO 2022)


def score_blasts(cells: pd.DataFrame, rng: np.random.Generator, blast_from: float | None = None) -> Json:
    """AUC of the blast probability: cells labelled BLAST against all other labelled cells, parent-labelled included; null where the
    model was not trained on blasts.

    Args:
        blast_from: the model's own limit (`probability_for_ppv`); with it `screen` counts cells from that probability on as found.
    """
    column = codes().types.index(BLAST)
    true_N = (cells["label"] == codes().codes.index(BLAST)).to_numpy()
    said_N, cluster_N = (cells["predicted"] == column).to_numpy(), cells["cluster"].to_numpy()
    chance_N = probabilities(cells)[:, column]
    trained = BLAST in trained_types(cells)
    found: Json = {
        "support": int(true_N.sum()),
        "trained": trained,
        "auc": auc(chance_N, true_N & trained, cluster_N, rng),
        "sensitivity": share(said_N[true_N], cluster_N[true_N], rng),
        "ppv": share(true_N[said_N], cluster_N[said_N], rng),
    }
    if blast_from is not None:
        over_N = chance_N >= blast_from
        found["screen"] = {
            "from": blast_from,
            "sensitivity": share(over_N[true_N], cluster_N[true_N], rng),
            "ppv": share(true_N[over_N], cluster_N[over_N], rng),
        }
    return found


LEAST_FOUND = 20
BETA = 2


def probability_for_ppv(
    chance_N: NDArray[np.floating], true_N: NDArray[np.bool_], ppv: float, least: int = LEAST_FOUND
) -> float | None:
    """Of the probabilities from which `ppv` and more of the cells are blasts, the one of the greatest F-measure, in which
    sensitivity weighs `BETA` times as much as PPV (van Rijsbergen 1979); six places, rounded down; None where there is none that
    `least` cells reach.

    The least such probability would give PPV away where it finds no further blast. To be learned on cells that do not judge it. A
    positive predictive value hangs on how many blasts there are among the cells.
    """
    order = np.argsort(-chance_N, kind="stable")
    sorted_N = chance_N[order].astype(float)
    last = np.append(np.diff(sorted_N) != 0, True)  # cells of one probability are found together or not at all
    count, right = np.arange(1, len(order) + 1), np.cumsum(true_N[order])
    measure = (1 + BETA**2) * right / (count + BETA**2 * true_N.sum())
    measure[~last | (count < least) | (right / count < ppv)] = -1
    return float(np.floor(sorted_N[measure.argmax()] * 1e6) / 1e6) if (measure > 0).any() else None


PSEUDO_CELLS = 100


def false_alarm_share(cells: pd.DataFrame, said_N: NDArray[np.bool_]) -> Json:
    """The largest share of cells called blasts on a smear without a labelled one: a smear with more is flagged.

    Of smears with `PSEUDO_CELLS` / 2 cells and more. Cells of sites without smears are cut into hundreds in the order of their
    digests, as `score_pseudo_smears` cuts them. To be learned on patients that do not judge it.

    Args:
        cells: sha256, site, smear, true_type; labelled. said_N: whether each is called a blast.

    Returns:
        `above` (null where every smear has blasts), and the numbers of `smears` and `pseudo_smears` that it rests on.
    """
    frame = cells[["sha256", "site", "smear"]].assign(true=(cells["true_type"] == BLAST).to_numpy(bool), said=said_N)
    loose = frame["smear"].isna()
    known = frame[~loose].groupby(["site", "smear"])[["true", "said"]].agg(["sum", "size"])
    free = known[(known["true", "sum"] == 0) & (known["true", "size"] >= PSEUDO_CELLS // 2)]
    shares = list(free["said", "sum"] / free["said", "size"])
    hundreds = _hundreds(frame[loose & ~frame["true"]])
    apart = [share for of_site in hundreds.values() for share in of_site]
    above = max([*shares, *apart], default=None)
    return {"above": None if above is None else float(above), "smears": len(shares), "pseudo_smears": len(apart)}


def _hundreds(free: pd.DataFrame) -> dict[str, list[float]]:
    """Site to the share called blasts (`said`) in each hundred of its cells, in the order of their digests."""
    found = {}
    for site, part in free.sort_values("sha256").groupby("site"):
        said = part["said"].to_numpy(bool)
        whole = len(said) // PSEUDO_CELLS * PSEUDO_CELLS
        if whole:
            found[str(site)] = [float(share) for share in said[:whole].reshape(-1, PSEUDO_CELLS).mean(axis=1)]
    return found


def score_pseudo_smears(cells: pd.DataFrame, flag_above: float) -> Json:
    """Of sites without smears: cells without a blast's label, cut into pseudo-smears, and how many of them are flagged.

    Another laboratory's cells of one label each: they say how often it calls blasts where there are none, no specificity."""
    free = cells[cells["smear"].isna() & (cells["label"] != codes().codes.index(BLAST))]
    said = free["predicted"] == codes().types.index(BLAST)
    return {
        site: {"smears": len(shares), "flagged": sum(share > flag_above for share in shares)}
        for site, shares in _hundreds(free[["sha256", "site"]].assign(said=said)).items()
    }


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
