"""The gate: is the challenger at least as good as the champion on the same frozen smears? Pure, and deterministic.

Both named the same cells, so what is resampled is the difference, by patient. The challenger passes a metric when the lower
bound of the 90 % interval of (challenger - champion) lies above -margin (metrics.intervals.paired_difference).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from smearline import vocabulary
from smearline.metrics.intervals import bootstrap_counts, paired_difference

LEVEL = 0.9


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
    """Accuracy over all and at every site, and the sensitivity for blasts.

    Args:
        cells: the frozen cells: sha256, site, patient (may be null), true_type (a type or a parent; not null).
        challenger, champion: sha256 to predicted type; None: there is no champion yet, and a metric need only exist.
    """
    words = vocabulary.load()
    scopes = {"accuracy": np.ones(len(cells), bool)}
    scopes |= {f"{site}.accuracy": (cells["site"] == site).to_numpy(bool) for site in sorted(set(cells["site"]))}
    scopes["blast_sensitivity"] = (cells["true_type"] == "BLAST").to_numpy(bool)
    patient = (cells["site"] + "/" + cells["patient"]).where(cells["patient"].notna(), cells["sha256"])
    cluster_N = pd.factorize(patient)[0].astype(np.int64)

    def right(named: Mapping[str, str]) -> np.ndarray:
        """1 right, 0 wrong, NaN where the model named nothing."""
        answers = [(named.get(s), words.children(t)) for s, t in zip(cells["sha256"], cells["true_type"], strict=True)]
        return np.array([math.nan if said is None else float(said in allowed) for said, allowed in answers])

    new_N = right(challenger)
    old_N = None if champion is None else right(champion)
    rng = np.random.default_rng(seed)
    return [
        _check(metric, new_N[of_N], None if old_N is None else old_N[of_N], cluster_N[of_N], margin, rng)
        for metric, of_N in scopes.items()
    ]


def _check(
    metric: str,
    new_N: np.ndarray,
    old_N: np.ndarray | None,
    cluster_N: np.ndarray,
    margin: float,
    rng: np.random.Generator,
) -> Check:
    new, old = _mean(new_N), None if old_N is None else _mean(old_N)
    missing = [who for who, value in (("champion", old), ("challenger", new)) if value is None]
    if old_N is None and new is not None:
        return Check(metric, len(new_N), None, new, None, True, "no champion: nothing to compare")
    if old_N is None or old is None or new is None:
        why = "a frozen cell was not named" if len(new_N) else "no such cell among the frozen ones"
        return Check(metric, len(new_N), old, new, None, False, f"missing for the {missing[-1]} ({why}): refused")
    change_N1 = (new_N - old_N + 1).astype(np.int64)[:, None]
    counts_B3 = bootstrap_counts(cluster_N, change_N1, 3, rng)
    lost, _, gained = counts_B3[0]
    change_B = (counts_B3[:, 2] - counts_B3[:, 0]) / counts_B3.sum(axis=1)
    low = paired_difference(change_B, gained, lost, len(new_N), level=LEVEL)["low"]
    passed = low > -margin
    says = "not worse" if passed else "worse" if new < old else "too few cells to show that it is not worse"
    return Check(metric, len(new_N), old, new, round(low, 6), passed, f"{says} (margin {margin:g})")


def _mean(right_N: np.ndarray) -> float | None:
    return None if not len(right_N) or np.isnan(right_N).any() else round(float(right_N.mean()), 6)


def seen_in_training(cells: pd.DataFrame, trained_on: pd.DataFrame) -> Check:
    """No frozen cell, nor another cell of its patient, may be in the challenger's training set (sha256, site, patient)."""
    known = trained_on[trained_on["patient"].notna()]
    patients = set(zip(known["site"], known["patient"], strict=True))
    of_patient = [pair in patients for pair in zip(cells["site"], cells["patient"], strict=True)]
    num = int((cells["sha256"].isin(trained_on["sha256"]) | np.array(of_patient, bool)).sum())
    says = "none was trained on" if not num else f"{num} frozen cells, or their patients, were trained on: refused"
    return Check("not_seen_in_training", len(cells), None, None, None, num == 0, says)


def diagnosis(challenger: Mapping[str, Any], champion: Mapping[str, Any], margin: float) -> list[Check]:
    """The diagnostic models by their own cross-validated AUC, each on its data: not below the champion's lower bound, nor by
    more than the margin below its value, whichever is lower. Nothing where the champion has none."""
    old, new = champion.get("diagnosis/auc"), challenger.get("diagnosis/auc")
    if old is None:
        return []
    limit = min(old - margin, champion.get("diagnosis/auc_low", old))
    says = "missing for the challenger: refused" if new is None else f"the limit is {limit:.3f}"
    return [Check("diagnosis_auc", None, old, new, None, new is not None and new >= limit, says)]


def diagnosed(truth: Named, challenger: Named | None, champion: Named | None, margin: float) -> list[Check]:
    """The diagnoses of the same frozen smears: the share that is right, an abstention counting as not right. Patients are
    few, so nothing is proved: refused is what loses more than `margin` of the smears. Nothing where the champion names none.

    Args:
        truth: (site, smear) to the patient's diagnosis. challenger, champion: to the group named, None where abstained;
            None: the package has no diagnostic model.
    """
    if not truth or champion is None:
        return []
    old, new = (
        None if named is None else sum(named.get(smear) == group for smear, group in truth.items()) / len(truth)
        for named in (champion, challenger)
    )
    if new is None:
        return [Check("diagnosis_right", len(truth), old, None, None, False, "missing for the challenger: refused")]
    says = f"of {len(truth)} frozen smears; at most {margin:g} may be lost"
    return [Check("diagnosis_right", len(truth), old, new, None, new >= (old or 0) - margin - 1e-9, says)]


def verdict(checks: Iterable[Check], **about: Any) -> dict[str, Any]:
    """The result as JSON, without a time: the same comparison gives the same bytes."""
    rows = list(checks)
    refused = [c.metric for c in rows if not c.passed]
    says = f"refused: {', '.join(refused)}" if refused else "passed"
    if about.get("champion") is None and not refused:
        says = "passed: no champion, nothing to compare"
    return {**about, "passed": bool(rows) and not refused, "says": says, "checks": [asdict(c) for c in rows]}
