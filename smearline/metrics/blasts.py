"""Blasts: cell by cell, and on each smear, which is what a laboratory acts on."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from smearline.metrics.cells import codes, probabilities, trained_types
from smearline.metrics.intervals import auc, exact_bounds, share
from smearline.vocabulary import load

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


LEAST_CELLS = PSEUDO_CELLS // 2
"""Cells of a differential below which a smear is neither learned from nor flagged: of few cells one wrong name is a large share."""


def counted(names: pd.Series) -> "pd.Series[bool]":
    """Whether each name is one of a differential, or a parent of such: of these cells alone blasts are a share."""
    of_differential = set(load().differential_types)
    known = {code: set(load().children(code)) <= of_differential for code in codes().codes}
    return names.map(known).fillna(False).astype(bool)


def false_alarm_share(cells: pd.DataFrame, predicted_N: Sequence[str]) -> Json:
    """The largest share of counted cells called blasts on a smear without a labelled one: a smear with more is flagged.

    Of smears with `LEAST_CELLS` counted cells and more. Cells of sites without smears are cut into hundreds in the order of their
    digests, as `score_pseudo_smears` cuts them. To be learned on patients that do not judge it.

    Args:
        cells: sha256, site, smear, true_type; labelled. predicted_N: what each is called.

    Returns:
        `above` (null where every smear has blasts), and the numbers of `smears` and `pseudo_smears` that it rests on.
    """
    frame = _called(cells, pd.Series(predicted_N, cells.index)).assign(true=cells["true_type"].eq(BLAST).fillna(False))
    loose = frame["smear"].isna()
    known = frame[~loose].groupby(["site", "smear"])[["true", "said", "counted"]].sum()
    free = known[(known["true"] == 0) & (known["counted"] >= LEAST_CELLS)]
    shares = list(free["said"] / free["counted"])
    hundreds = _hundreds(frame[loose & ~frame["true"]])
    apart = [share for of_site in hundreds.values() for share in of_site]
    above = max([*shares, *apart], default=None)
    return {"above": None if above is None else float(above), "smears": len(shares), "pseudo_smears": len(apart)}


def _called(cells: pd.DataFrame, predicted: pd.Series) -> pd.DataFrame:
    """sha256, site, smear, and whether each cell is called a blast (`said`) and what a differential counts (`counted`)."""
    return cells[["sha256", "site", "smear"]].assign(said=predicted == BLAST, counted=counted(predicted))


def _hundreds(free: pd.DataFrame) -> dict[str, list[float]]:
    """Site to the share called blasts in each hundred of its cells that a differential counts, in the order of their digests."""
    found = {}
    for site, part in free[free["counted"]].sort_values("sha256").groupby("site"):
        said = part["said"].to_numpy(bool)
        whole = len(said) // PSEUDO_CELLS * PSEUDO_CELLS
        if whole:
            found[str(site)] = [float(share) for share in said[:whole].reshape(-1, PSEUDO_CELLS).mean(axis=1)]
    return found


def score_pseudo_smears(cells: pd.DataFrame, flag_above: float) -> Json:
    """Of sites without smears: cells without a blast's label, cut into pseudo-smears, and how many of them are flagged.

    Another laboratory's cells of one label each: they say how often it calls blasts where there are none, no specificity."""
    free = cells[cells["smear"].isna() & (cells["label"] != codes().codes.index(BLAST))]
    return {
        site: {"smears": len(shares), "flagged": sum(share > flag_above for share in shares)}
        for site, shares in _hundreds(_called(free, free["predicted_type"])).items()
    }


def score_smears(cells: pd.DataFrame, rng: np.random.Generator, flag_above: float | None = None) -> Json:
    """True and predicted blasts of each smear, as shares of its labelled cells that are, and that are called, what a differential
    counts (argmax), with exact binomial intervals.

    The shares of smears found count smears; their intervals resample patients.

    Args:
        flag_above: the model's own limit (`false_alarm_share`); with it the smears flagged are counted as well, of those with
            `LEAST_CELLS` cells that are called so.
    """
    named = cells[cells["smear"].notna()]
    if named.empty:
        return {"num_smears": 0}
    smears = (
        named.assign(
            true=named["label"] == codes().codes.index(BLAST),
            said=named["predicted"] == codes().types.index(BLAST),
            true_counts=counted(named["true_type"]),
            said_counts=counted(named["predicted_type"]),
        )
        .groupby(["site", "smear"])
        .agg(
            patient=("patient", "first"),
            cells=("true", "size"),
            true_blasts=("true", "sum"),
            predicted_blasts=("said", "sum"),
            true_counted=("true_counts", "sum"),
            predicted_counted=("said_counts", "sum"),
            cluster=("cluster", "max"),
        )
        .reset_index()
    )
    shares = {}
    for whose in ("true", "predicted"):
        hits_S, total_S = smears[f"{whose}_blasts"], smears[f"{whose}_counted"].clip(lower=1)
        ends = zip(hits_S / total_S, *exact_bounds(hits_S, total_S), strict=True)
        shares[f"{whose}_share"] = [dict(zip(("value", "low", "high"), e, strict=True)) for e in ends]
    any_true, any_said = smears["true_blasts"] > 0, smears["predicted_blasts"] > 0
    part_true, part_said = (smears[f"{w}_blasts"] / smears[f"{w}_counted"].clip(lower=1) for w in ("true", "predicted"))
    many_true, many_said = part_true >= MANY, part_said >= MANY

    def found(group: pd.Series, said: pd.Series) -> Json:
        return {"smears": int(group.sum()), **share(said[group], smears.loc[group, "cluster"], rng)}

    flagged: Json = {}
    if flag_above is not None:
        above, enough = part_said > flag_above, smears["predicted_counted"] >= LEAST_CELLS
        which = {"any_blast": any_true & enough, "many_blasts": many_true & enough, "no_blast": ~any_true & enough}
        flagged = {
            "flag_above": flag_above,
            "least_cells": LEAST_CELLS,
            "too_few_cells": int((~enough).sum()),
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
