"""The gate: is the challenger at least as good as the champion on the same frozen smears? Pure, and deterministic.

Both named the same cells, so what is resampled is the difference, by patient. The challenger passes a metric when the lower
bound of the 90 % interval of (challenger - champion) lies above -margin. The interval is the union of the bootstrap's and of
one that takes cells as independent (Agresti & Min 2005), since the bootstrap collapses where nothing differs among few.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from smearline import vocabulary

RESAMPLES = 1000
Z90 = 1.6448536269514722


@dataclass(frozen=True)
class Check:
    """One line of the gate's result. Shares in 0..1; None where it cannot be computed."""

    metric: str
    cells: int | None
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
    change_N = new_N - old_N
    _, of_N = np.unique(cluster_N, return_inverse=True)
    gained_C, cells_C = np.bincount(of_N, change_N), np.bincount(of_N)
    weight_BC = rng.multinomial(len(cells_C), np.full(len(cells_C), 1 / len(cells_C)), size=RESAMPLES)
    low = float(np.quantile((weight_BC @ gained_C) / (weight_BC @ cells_C), 0.05))
    b, c, n = (change_N > 0).sum() + 0.5, (change_N < 0).sum() + 0.5, len(new_N) + 2
    low = min(low, float((b - c) / n - Z90 * math.sqrt(b + c - (b - c) ** 2 / n) / n))
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


def verdict(checks: Iterable[Check], **about: Any) -> dict[str, Any]:
    """The result as JSON, without a time: the same comparison gives the same bytes."""
    rows = list(checks)
    refused = [c.metric for c in rows if not c.passed]
    says = f"refused: {', '.join(refused)}" if refused else "passed"
    if about.get("champion") is None and not refused:
        says = "passed: no champion, nothing to compare"
    return {**about, "passed": bool(rows) and not refused, "says": says, "checks": [asdict(c) for c in rows]}
