"""Witnesses that do not look at the pictures' colours: the reviewers who changed answers, and the analyser's differential of
the same blood. A missing witness is printed as missing, never as agreement."""

import math
from collections.abc import Mapping
from typing import Literal

import pandas as pd
from pydantic import BaseModel
from scipy.stats import t as student

from smearline.cbc import latest
from smearline.metrics.intervals import exact_bounds

ANALYSER = {
    "NEUT%": ("NEUT_SEG", "NEUT_BAND", "METAMYELO", "MYELO", "PROMYELO"),
    "LYMPH%": ("LYMPH", "LYMPH_ATYP"),
    "MONO%": ("MONO",),
    "EO%": ("EOS",),
    "BASO%": ("BASO",),
}
"""Sysmex XN counts immature granulocytes among its neutrophils (docs/data.md, 'Blood counts')."""
_WHITE = [*(t for types in ANALYSER.values() for t in types), "BLAST", "PLASMA"]
_LEAST = 5


class Witness(BaseModel, frozen=True):
    status: Literal["missing", "too little", "agrees", "disagrees"]
    says: str


def reviewers(counts: Mapping[str, int] | None, limit: float | None) -> Witness:
    """`counts`: cases_reviewed, cells_reviewed, cells_overridden. Disagrees when the 95 % interval of the share changed lies
    above `limit`."""
    if not counts or not counts["cells_reviewed"]:
        return Witness(status="missing", says="no case of these days was signed off by a reviewer")
    changed, seen = counts["cells_overridden"], counts["cells_reviewed"]
    low, high = (float(v) for v in exact_bounds(changed, seen))
    says = f"changed {changed} of {seen} signed-off cells ({100 * low:.1f} to {100 * high:.1f} %)"
    if limit is None:
        return Witness(status="too little", says=f"{says}; no limit has been measured yet")
    if counts["cases_reviewed"] < _LEAST:
        says += f"; of {counts['cases_reviewed']} cases, and {_LEAST} are needed"
        return Witness(status="too little", says=says)
    return _heard(low, high, limit, f"{says}; the limit is {100 * limit:.1f} %")


def analyser(counts: pd.DataFrame | None, smears: pd.DataFrame, limit: float) -> Witness:
    """`counts`: rows of cbc.COUNTS. Disagrees when, for one of its five types, the mean difference from the served share
    of white cells on the same smears lies beyond `limit` with its 95 % interval (Student's, Bonferroni's over the types)."""
    if counts is not None:
        counts = latest(counts)
        counts = counts[counts["value"].notna() & counts["parameter"].isin(list(ANALYSER))]
    if counts is None or counts.empty:
        return Witness(status="missing", says="no blood count with a differential was sent for these smears")
    theirs = counts.pivot(index="smear", columns="parameter", values="value")
    ours = smears.set_index("smear").filter(like="served_").rename(columns=lambda name: name.removeprefix("served_"))
    white = ours[_WHITE].sum(axis=1)
    gaps = {n: ours[list(ANALYSER[n])].sum(axis=1) / white.where(white > 0) - theirs[n] / 100 for n in theirs}
    known = {name: gap.dropna() for name, gap in gaps.items() if gap.notna().sum() >= _LEAST}
    if not known:
        return Witness(status="too little", says=f"fewer than {_LEAST} smears have a value of its differential")
    found = []
    for name, gap in known.items():
        mean, room = float(gap.mean()), student.ppf(1 - 0.025 / len(known), len(gap) - 1) / math.sqrt(len(gap))
        half = float(room * gap.std())
        found.append((abs(mean) - half, abs(mean) + half, name, mean, half, len(gap)))
    told = max(found)
    if told[0] <= limit:
        told = max(found, key=lambda row: row[1])  # the one that could still differ most
    low, high, name, mean, half, count = told
    says = f"{name}: ours is {100 * mean:+.1f} points from its own on {count} smears (give or take {100 * half:.1f})"
    return _heard(low, high, limit, f"{says}; the limit is {100 * limit:.0f}")


def _heard(low: float, high: float, limit: float, says: str) -> Witness:
    return Witness(status="disagrees" if low > limit else "agrees" if high <= limit else "too little", says=says)
