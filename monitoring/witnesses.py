"""Witnesses that do not look at the pictures' colours: the reviewers who changed answers, and the analyser's differential of
the same blood. A missing witness is printed as missing, never as agreement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict

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


class Witness(BaseModel):
    model_config = ConfigDict(frozen=True)

    status: Literal["missing", "too little", "agrees", "disagrees"]
    says: str


def reviewers(counts: Mapping[str, int] | None, limit: float | None) -> Witness:
    """`counts`: CaseStore.review_counts of the window. Disagrees when the 95 % interval of the share changed lies above `limit`."""
    if not counts or not counts["cells_reviewed"]:
        return Witness(status="missing", says="no case of these days was signed off by a reviewer")
    changed, seen = counts["cells_overridden"], counts["cells_reviewed"]
    low, high = (float(v) for v in exact_bounds(changed, seen))
    says = f"changed {changed} of {seen} signed-off cells ({100 * low:.1f} to {100 * high:.1f} %)"
    if limit is None:
        return Witness(status="too little", says=f"{says}; no limit has been measured yet")
    return _heard(low, high, limit, f"{says}; the limit is {100 * limit:.1f} %")


def analyser(counts: pd.DataFrame | None, smears: pd.DataFrame, limit: float) -> Witness:
    """`counts`: rows of cbc.COUNTS. Disagrees when, for one of its five types, the mean difference from our share of white
    cells on the same smears lies beyond `limit` by two standard errors."""
    theirs = (
        pd.DataFrame() if counts is None else counts[counts["value"].notna() & counts["parameter"].isin(list(ANALYSER))]
    )
    if theirs.empty:
        return Witness(status="missing", says="no blood count with a differential was sent for these smears")
    theirs = theirs.drop_duplicates(["smear", "parameter"], keep="last").pivot(
        index="smear", columns="parameter", values="value"
    )
    ours = smears.set_index("smear")
    white = ours[[f"share_{t}" for t in _WHITE]].sum(axis=1)
    gaps = {
        n: ours[[f"share_{t}" for t in ANALYSER[n]]].sum(axis=1) / white.where(white > 0) - theirs[n] / 100
        for n in theirs
    }
    known = {name: gap.dropna() for name, gap in gaps.items() if gap.notna().sum() >= _LEAST}
    if not known:
        return Witness(status="too little", says=f"fewer than {_LEAST} smears have a value of its differential")
    name, gap = max(known.items(), key=lambda item: abs(item[1].mean()))
    mean, error = float(gap.mean()), float(gap.std() / math.sqrt(len(gap)))
    says = (
        f"{name}: ours is {100 * mean:+.1f} points from its own on {len(gap)} smears (standard error {100 * error:.1f})"
    )
    return _heard(abs(mean) - 2 * error, abs(mean) + 2 * error, limit, f"{says}; the limit is {100 * limit:.0f}")


def _heard(low: float, high: float, limit: float, says: str) -> Witness:
    return Witness(status="disagrees" if low > limit else "agrees" if high <= limit else "too little", says=says)
