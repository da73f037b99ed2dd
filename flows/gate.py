"""The gate: is the challenger at least as good as the champion on the same frozen smears? Pure, and deterministic.

Both named the same cells, so what is resampled is the difference, by patient. The challenger passes a metric when the lower
bound of the 90 % interval of (challenger - champion) lies above -margin (metrics.intervals.paired_difference).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from smearline import dataset, vocabulary
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
        cells: the frozen cells: sha256, site, patient, smear (both may be null), true_type (a type or a parent; not null).
        challenger, champion: sha256 to predicted type; None: there is no champion yet, and a metric need only exist.
    """
    words, rng = vocabulary.load(), np.random.default_rng(seed)
    cells = cells.assign(cluster=pd.factorize(dataset.whose(cells))[0].astype(np.int64))
    models = {"challenger": challenger} if champion is None else {"challenger": challenger, "champion": champion}

    def told(right: Callable[[str, str], bool]) -> pd.DataFrame:
        """The cells with a column for each model: 1 right, 0 wrong, NaN where it named nothing."""
        columns = {}
        for who, model in models.items():
            pairs = zip(cells["sha256"].map(model.get), cells["true_type"], strict=True)
            columns[who] = [float(right(n, t)) if isinstance(n, str) else math.nan for n, t in pairs]
        return cells.assign(**columns)

    right = told(lambda named, true: named in words.children(true))
    blast = cells["true_type"] == "BLAST"
    frequent = cells.groupby("true_type")["true_type"].transform("size") >= LEAST_OF_TYPE
    return [
        _check("accuracy", right, margin, rng),
        *(_check(f"{site}.accuracy", part, margin, rng) for site, part in right.groupby("site")),
        _check("balanced_accuracy", right[frequent], margin, rng, by="true_type"),
        _check("blast_sensitivity", right[blast], margin, rng),
        _check("blast_specificity", told(lambda named, _: named != "BLAST")[~blast], margin / 3, rng),
    ]


def _check(metric: str, cells: pd.DataFrame, margin: float, rng: np.random.Generator, by: str | None = None) -> Check:
    """The share right (the mean of it over the values of `by`), challenger against champion."""
    num, clusters = len(cells), cells["cluster"].nunique()
    unit = "patients" if cells["patient"].notna().any() else "smears" if cells["smear"].notna().any() else ""
    group_N = np.zeros(num, np.int64) if by is None else pd.factorize(cells[by])[0]
    values = {who: _mean(cells[who].to_numpy(float), group_N) for who in ("challenger", "champion") if who in cells}
    new, old = values["challenger"], values.get("champion")
    told = partial(Check, metric, num, old, new)
    if missing := [who for who, value in values.items() if value is None]:
        why = "a frozen cell was not named" if num else "no such cell among the frozen ones: label some of another site"
        return told(None, False, f"missing for the {missing[0]} ({why}): refused")
    if old is None or new is None:
        return told(None, True, "no champion: nothing to compare")
    few = bool(unit) and clusters < LEAST_PATIENTS
    if metric.endswith(".accuracy") and (num < LEAST_CELLS or few):
        of = f" of {clusters} {unit}" if unit else ""
        return told(None, True, f"not tested: {num} cells{of} can show nothing; watch this site")
    if few:
        return told(None, False, f"{clusters} {unit} cannot show it; {LEAST_PATIENTS} are needed")
    change_N = (cells["challenger"] - cells["champion"] + 1).to_numpy(np.int64)
    index_N1, num_groups = (3 * group_N + change_N)[:, None], int(group_N.max()) + 1
    counts_BG3 = bootstrap_counts(cells["cluster"].to_numpy(), index_N1, 3 * num_groups, rng).reshape(-1, num_groups, 3)
    change_BG = ratio(counts_BG3[..., 2] - counts_BG3[..., 0], counts_BG3.sum(axis=2))
    each = [
        paired_difference(change_BG[:, g], gained, lost, lost + same + gained, level=LEVEL)
        for g, (lost, same, gained) in enumerate(counts_BG3[0])
    ]
    bounds = (np.array([e["low"] for e in each]), np.array([e["high"] for e in each]))
    low = mean(change_BG, bounds, level=LEVEL)["low"]
    passed = low > -margin
    says = "not worse" if passed else "worse" if new < old else "too few cells to show that it is not worse"
    return told(round(low, 6), passed, f"{says} (margin {margin:.3g})")


def _mean(right_N: np.ndarray, group_N: np.ndarray) -> float | None:
    if not len(right_N) or np.isnan(right_N).any():
        return None
    return round(float((np.bincount(group_N, right_N) / np.bincount(group_N)).mean()), 6)


def seen_in_training(cells: pd.DataFrame, trained_on: pd.DataFrame) -> Check:
    """No frozen cell, nor another cell of its patient, may be in the challenger's training set (sha256, site, patient, smear)."""
    num = int(dataset.trained_on(cells, trained_on).sum())
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
    both = (champion, challenger)
    old, new = (sum(named.get(s) == group for s, group in truth.items()) / num for named in both)
    old_wrong, new_wrong = (
        sum(named.get(s) not in (group, None) for s, group in truth.items()) / num for named in both
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
