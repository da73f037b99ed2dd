"""The gate: is the challenger at least as good as the champion on the same frozen smears? Pure, and deterministic.

Both named the same cells, so what is resampled is the difference, by patient. The challenger passes a metric when the lower
bound of the 90 % interval of (challenger - champion) lies above -margin (metrics.intervals.paired_difference).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from smearline import vocabulary
from smearline.metrics.intervals import bootstrap_counts, mean, paired_difference, ratio

LEVEL = 0.9
LEAST_PATIENTS = 5
"""With fewer the interval says too much: at 10 patients a loss of the margin passed in 6 of 100, at 5 in 10, at 3 in 16, at 1 in
37 (simulated, patients differing by 5 points)."""
LEAST_CELLS = 150
"""A site with fewer cells does not vote: below 53 even the same model could not pass, and chance would decide for long after."""
LEAST_OF_TYPE = 20
"""Types with fewer frozen cells are not in the mean over types."""


Named = Mapping[tuple[str, str], str | None]
"""(site, smear) to a diagnosis."""


@dataclass(frozen=True)
class Check:
    """One line of the gate's result. Shares in 0..1; None where it cannot be computed."""

    metric: str
    cells: int | None
    """Cells, or smears, that it rests on."""
    champion: float | None
    challenger: float | None
    low: float | None
    """Lower bound of the difference."""
    passed: bool
    says: str


def compare(
    cells: pd.DataFrame,
    challenger: Mapping[str, str],
    champion: Mapping[str, str] | None,
    *,
    margin: float,
    seed: int,
) -> list[Check]:
    """Accuracy over all and at every site that has enough to tell, the mean over types, and blasts: those found, and how seldom
    another cell is called one (at a third of the margin, since blasts are rare).

    Args:
        cells: the frozen cells: sha256, site, patient (may be null), true_type (a type or a parent; not null).
        challenger, champion: sha256 to predicted type; None: there is no champion yet, and a metric need only exist.
    """
    words, rng = vocabulary.load(), np.random.default_rng(seed)
    patient = cells["patient"].astype("string")
    cluster_N = pd.factorize((cells["site"] + "/" + patient).fillna("cell " + cells["sha256"]))[0].astype(np.int64)
    answers = [[model.get(s) for s in cells["sha256"]] for model in (challenger, champion) if model is not None]

    def told(right: Callable[[str, str], bool]) -> list[np.ndarray]:
        """Of the challenger and the champion: 1 right, 0 wrong, NaN where the model named nothing."""
        return [
            np.array(
                [
                    float(right(n, t)) if isinstance(n, str) else math.nan
                    for n, t in zip(named, cells["true_type"], strict=True)
                ]
            )
            for named in answers
        ]

    right = told(lambda named, true: named in words.children(true))
    blast = (cells["true_type"] == "BLAST").to_numpy(bool)
    frequent = cells.groupby("true_type")["true_type"].transform("size").to_numpy() >= LEAST_OF_TYPE
    types_N = pd.factorize(cells["true_type"])[0]

    def check(
        metric: str, of_N: np.ndarray, right: list[np.ndarray], margin: float, groups_N: np.ndarray | None = None
    ) -> Check:
        groups = np.zeros(int(of_N.sum()), np.int64) if groups_N is None else pd.factorize(groups_N[of_N])[0]
        known = patient[of_N].notna().any()
        return _check(metric, [r[of_N] for r in right], cluster_N[of_N], groups, known, margin, rng)

    everywhere = np.ones(len(cells), bool)
    return [
        check("accuracy", everywhere, right, margin),
        *(
            check(f"{s}.accuracy", (cells["site"] == s).to_numpy(bool), right, margin)
            for s in sorted(set(cells["site"]))
        ),
        check("balanced_accuracy", frequent, right, margin, types_N),
        check("blast_sensitivity", blast, right, margin),
        check("blast_specificity", ~blast, told(lambda named, _: named != "BLAST"), margin / 3),
    ]


def _check(
    metric: str,
    right: list[np.ndarray],
    cluster_N: np.ndarray,
    group_N: np.ndarray,
    patients_known: bool,
    margin: float,
    rng: np.random.Generator,
) -> Check:
    """The mean over groups of the share right, challenger against champion."""
    num, clusters = len(cluster_N), len(np.unique(cluster_N))
    values = [_mean(r, group_N) for r in right]
    new, old = values[0], values[1] if len(values) > 1 else None
    missing = [who for who, value in zip(("challenger", "champion"), values, strict=False) if value is None]
    if missing:
        why = "a frozen cell was not named" if num else "no such cell among the frozen ones: label some of another site"
        return Check(metric, num, old, new, None, False, f"missing for the {missing[0]} ({why}): refused")
    if old is None or new is None:
        return Check(metric, num, None, new, None, True, "no champion: nothing to compare")
    few = patients_known and clusters < LEAST_PATIENTS
    if metric.endswith(".accuracy") and (num < LEAST_CELLS or few):
        of = f" of {clusters} patients" if patients_known else ""
        return Check(
            metric, num, old, new, None, True, f"not tested: {num} cells{of} can show nothing; watch this site"
        )
    if few:
        return Check(
            metric, num, old, new, None, False, f"{clusters} patients cannot show it; {LEAST_PATIENTS} are needed"
        )
    change_N = (right[0] - right[1] + 1).astype(np.int64)
    counts_B = bootstrap_counts(cluster_N, (3 * group_N + change_N)[:, None], 3 * (int(group_N.max()) + 1), rng)
    counts_BG3 = counts_B.reshape(len(counts_B), -1, 3)
    change_BG = ratio(counts_BG3[..., 2] - counts_BG3[..., 0], counts_BG3.sum(axis=2))
    each = [
        paired_difference(change_BG[:, g], gained, lost, lost + same + gained, level=LEVEL)
        for g, (lost, same, gained) in enumerate(counts_BG3[0])
    ]
    bounds = (np.array([e["low"] for e in each]), np.array([e["high"] for e in each]))
    low = mean(change_BG, bounds, level=LEVEL)["low"]
    passed = low > -margin
    says = "not worse" if passed else "worse" if new < old else "too few cells to show that it is not worse"
    return Check(metric, num, old, new, round(low, 6), passed, f"{says} (margin {margin:.3g})")


def _mean(right_N: np.ndarray, group_N: np.ndarray) -> float | None:
    if not len(right_N) or np.isnan(right_N).any():
        return None
    return round(float((np.bincount(group_N, right_N) / np.bincount(group_N)).mean()), 6)


def seen_in_training(cells: pd.DataFrame, trained_on: pd.DataFrame) -> Check:
    """No frozen cell, nor another cell of its patient, may be in the challenger's training set (sha256, site, patient)."""
    known = trained_on[trained_on["patient"].notna()]
    patients = set(zip(known["site"], known["patient"], strict=True))
    of_patient = [pair in patients for pair in zip(cells["site"], cells["patient"], strict=True)]
    num = int((cells["sha256"].isin(trained_on["sha256"]) | np.array(of_patient, bool)).sum())
    says = "none was trained on" if not num else f"{num} frozen cells, or their patients, were trained on: refused"
    if trained_on.empty:
        says = "the package does not say what it was trained on: refused"
    return Check("not_seen_in_training", len(cells), None, None, None, num == 0 and len(trained_on) > 0, says)


def diagnosis(challenger: Mapping[str, Any], champion: Mapping[str, Any], margin: float) -> list[Check]:
    """The diagnostic models, by their lineages: every group that the champion names, and a cross-validated AUC, each on its own
    data, no more than the margin below the champion's. Nothing where the champion has no such model."""
    old, new = (lineage["metrics"].get("diagnosis/auc") for lineage in (champion, challenger))
    if old is None:
        return []
    lacking = {*champion["diagnosis"]["groups"]} - {*(challenger.get("diagnosis") or {}).get("groups", ())}
    passed = new is not None and new >= old - margin and not lacking
    says = "missing for the challenger: refused" if new is None else f"the limit is {old - margin:.3f}"
    says += f"; it no longer names {', '.join(sorted(lacking))}" if lacking else ""
    return [Check("diagnosis_auc", None, old, new, None, passed, says)]


def diagnosed(truth: Named, challenger: Named | None, champion: Named | None, margin: float) -> list[Check]:
    """The diagnoses of the same frozen smears. Patients are few, so nothing is proved: refused is what names more than `margin`
    of the smears wrongly beyond the champion, or loses more than twice that of the right answers, be it by abstaining. Nothing
    where the champion names none.

    Args:
        truth: (site, smear) to the patient's diagnosis. challenger, champion: to the group named, None where abstained;
            None: the package has no diagnostic model.
    """
    if not truth or champion is None:
        return []
    num = len(truth)
    if challenger is None:
        return [Check("diagnosis_right", num, None, None, None, False, "missing for the challenger: refused")]
    (old, old_wrong), (new, new_wrong) = (
        (
            sum(named.get(smear) == group for smear, group in truth.items()) / num,
            sum(named.get(smear) not in (group, None) for smear, group in truth.items()) / num,
        )
        for named in (champion, challenger)
    )
    room = margin + 1e-9
    return [
        Check(
            "diagnosis_right", num, old, new, None, new >= old - 2 * room,
            f"of {num} frozen smears, the others named wrongly or abstained from; at most {2 * margin:g} may be lost",
        ),
        Check(
            "diagnosis_wrong", num, old_wrong, new_wrong, None, new_wrong <= old_wrong + room,
            f"of {num} frozen smears; at most {margin:g} more than the champion's",
        ),
    ]  # fmt: skip


def verdict(checks: Iterable[Check], **about: Any) -> dict[str, Any]:
    """The result as JSON, without a time: the same comparison gives the same bytes."""
    rows = list(checks)
    refused = [c.metric for c in rows if not c.passed]
    says = f"refused: {', '.join(refused)}" if refused else "passed" if rows else "refused: nothing was compared"
    if about.get("champion") is None and not refused:
        says = "passed: no champion, nothing to compare"
    return {**about, "passed": bool(rows) and not refused, "says": says, "checks": [asdict(c) for c in rows]}
