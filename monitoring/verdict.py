"""From what moved, and what the witnesses say, to one verdict in one sentence.

accept    every judged family is as the reference
observe   a family has moved, or a witness disagrees: look at the page
hold      hold automatic release: moved beyond the shift at which accuracy was seen to fall (limits.yaml); or staining,
          optics, confidence or embedding moved and a witness disagrees; or what every smear shows is not in sight
stop      moved beyond that shift and a witness disagrees: stop and review
cannot be judged    with the reason
"""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, Field

from monitoring.drift import Comparison, Feature
from monitoring.smears import NUCLEUS, describe, families
from monitoring.witnesses import Witness
from smearline.staining import STAINING

Word = Literal["accept", "observe", "hold", "stop", "cannot be judged"]
_LEAD = {"hold": "Hold automatic release", "stop": "Stop and review"}


class Finding(BaseModel, frozen=True):
    """One family."""

    status: Literal["as the reference", "moved", "cannot be judged"]
    because: str | None = None
    features: tuple[Feature, ...] = ()
    size: float | None = None
    """How far it has moved, in the unit of limits.yaml."""
    limit: float | None = None
    since: str | None = None
    lost: tuple[str, ...] = ()
    """Features that the reference's smears show and most of the window's do not."""

    @property
    def beyond(self) -> bool:
        return self.status == "moved" and self.size is not None and self.limit is not None and self.size >= self.limit

    @property
    def worst(self) -> Feature:
        return max(self.features, key=lambda f: f.ratio)


class Verdict(BaseModel):
    """verdict.json: the same log, reference and witnesses give the same, but for created_at."""

    site: str
    day: str
    verdict: Word
    sentence: str
    version: str
    window: dict[str, Any]
    num_smears: int
    num_cells: int
    families: dict[str, Finding]
    witnesses: dict[str, Witness]
    false_alarm_rate: float
    notes: tuple[str, ...]
    """What a reader must know of how it was judged."""
    reference: dict[str, Any]
    origin: str
    intended_use: str = "research use only"
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    path: Path = Field(exclude=True)
    """The folder of its report."""


@cache
def limits() -> dict[str, Any]:
    """limits.yaml, read once."""
    return dict(yaml.safe_load(files(__package__).joinpath("limits.yaml").read_text(encoding="utf-8")))


def find(comparison: Comparison, history: pd.DataFrame) -> dict[str, Finding]:
    """Each family's finding. `history`: the site's smears up to the window's end, from which 'since' is read."""
    found = {}
    for family in families():
        lost = comparison.lost.get(family, ())
        if because := comparison.because.get(family):
            found[family] = Finding(status="cannot be judged", because=because, lost=lost)
            continue
        features = comparison.features[family]
        worst = max(features, key=lambda f: f.ratio)
        found[family] = Finding(
            status="moved" if worst.moved else "cannot be judged" if lost else "as the reference",
            because=f"most smears do not show {listed([describe(n).words for n in lost])}" if lost else None,
            features=features,
            size=size_of(family, {f.name: f for f in features}),
            limit=limits().get(family, {}).get("limit"),
            since=_since(history, worst) if worst.moved else None,
            lost=lost,
        )
    return found


def size_of(family: str, features: Mapping[str, Feature]) -> float | None:
    """How far a family has moved, in the unit of limits.yaml; None where it has no limit, or cannot be given."""
    if family == "staining":
        features = {name: f for name, f in features.items() if name in STAINING}
        if not {name for name in STAINING if name not in NUCLEUS} <= set(features):
            return None  # of what is left no size can be given that compares with the limit
        shifts = [math.log10(f.reference / f.now) if "glass" in name else f.shift for name, f in features.items()]
        return round(float(np.sqrt(np.mean(np.square(shifts)))), 4)
    if family == "confidence" and "confidence_mean" in features:
        return round(-features["confidence_mean"].shift / 100, 4)
    return features["embedding_distance"].shift if family == "embedding" else None


def _since(history: pd.DataFrame, feature: Feature) -> str | None:
    """The first day from which every day's median lies nearer to the window's than to the reference's."""
    first, factor = None, describe(feature.name).factor
    days = history.dropna(subset=["day", feature.name]).groupby("day")[feature.name].median() * factor
    for day, value in reversed(list(days.items())):
        if abs(value - feature.now) > abs(value - feature.reference):
            break
        first = str(day)
    return first


def decide(found: Mapping[str, Finding], witnesses: Mapping[str, Witness], cannot: str | None) -> Word:
    """The verdict; `cannot` is why nothing can be said, or why an acceptance would say too much."""
    moved = {f for f, v in found.items() if v.status == "moved"}
    beyond = any(v.beyond for v in found.values())
    disagrees = any(w.status == "disagrees" for w in witnesses.values())
    if beyond and disagrees:
        return "stop"
    if beyond or (disagrees and moved - {"mix"}) or any(v.lost for v in found.values()):
        return "hold"
    if moved or disagrees:
        return "observe"
    return "cannot be judged" if cannot else "accept"


def sentence(
    word: Word, whose: str, found: Mapping[str, Finding], witnesses: Mapping[str, Witness], cannot: str | None
) -> str:
    """One sentence for a laboratory manager: what moved, by how much, since when. `whose`: '12 smears of SITE'."""
    if word == "cannot be judged":
        return f"Cannot be judged: {cannot}."
    by = {s: [f for f, v in found.items() if v.status == s] for s in ("as the reference", "moved", "cannot be judged")}
    same, moved = by["as the reference"], sorted(by["moved"], key=lambda f: -found[f].worst.ratio)
    if moved:
        first = found[moved[0]]
        change = f"{first.worst.words} from {number(first.worst, 'reference')} to {number(first.worst, 'now')} {first.worst.unit}"
        text = f"on {whose} the {moved[0]} has moved ({change})"
        text += f", and with it {listed(moved[1:])}" if moved[1:] else ""
        text += f", since {first.since}" if first.since else ""
        if moved == ["mix"] and {"staining", "optics"} <= set(same):
            text += ", while staining and optics have not: other patients, not a fault of the stain"
        if beyond := [f for f in moved if found[f].beyond]:
            text += f", which for {listed(beyond)} is beyond the shift at which accuracy was seen to fall"
    else:
        text = f"{whose} are as the reference in {listed(same)}" if same else f"nothing was judged on {whose}"
    if gone := [describe(name).words for f in found.values() for name in f.lost]:
        text += f"; most of them do not show {listed(gone)}, which every smear of the reference shows"
    if by["cannot be judged"]:
        text += f"; {listed(by['cannot be judged'])} could not be judged"
    against = [f"the {name}: {w.says}" for name, w in witnesses.items() if w.status == "disagrees"]
    text += f"; against it speaks {listed(against)}" if against else ""
    return f"{_LEAD.get(word, word.capitalize())}: {text}."


def number(feature: Feature, key: str) -> str:
    """A number of a feature, with the digits that its size calls for."""
    digits = 1 if feature.unit in ("%", "of 255") else 2 if abs(feature.reference) >= 1 else 3
    return f"{getattr(feature, key):{'+' if key == 'shift' else ''}.{digits}f}"


def listed(words: list[str]) -> str:
    """'a, b and c'."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
