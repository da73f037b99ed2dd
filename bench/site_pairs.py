"""Pairs of real sites: how far the smears have moved, what became of accuracy, and the limits that follow (for bench.drift)."""

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from monitoring import drift, verdict
from monitoring.reference import refer
from monitoring.smears import Centres, by_smear, named
from smearline import vocabulary

RESAMPLES = 1000
FALL = 0.03
"""A fall of accuracy counts when the lower bound of its 95 % interval is larger."""


@dataclass(frozen=True)
class Pair:
    name: str
    smears: dict[str, Any]
    findings: dict[str, verdict.Finding]
    accuracy: dict[str, Any] | None

    @property
    def fell(self) -> bool:
        return self.accuracy is not None and self.accuracy["low"] > FALL


def smears_of(cells: pd.DataFrame, centres: Centres | None, pseudo_cells: int) -> pd.DataFrame:
    """Rows of smears; those that training saw say nothing of confidence and embedding."""
    cells = named(cells, pseudo_cells)
    unseen = cells["split"] != "train"
    parts = [by_smear(cells[~unseen], None), by_smear(cells[unseen], centres)]
    return pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True)


def pair(name: str, base: pd.DataFrame, window: pd.DataFrame) -> Pair:
    size = 50 if window["smear"].notna().any() or len(window) >= 250 else 20
    known = refer(base.assign(site="base"), size)
    smears = smears_of(window, known.centres.get("base"), size)
    about = {
        "smears": [len(known.smears), len(smears)],
        "not_trained_on": [int((~s["seen"].astype(bool)).sum()) for s in (known.smears, smears)],
        "patients": [int(c["patient"].nunique()) for c in (base, window)],
        "pseudo_smears_of": size if smears["pseudo"].any() else None,
    }
    found = verdict.find(drift.compare(smears, known.smears, {}), smears)
    return Pair(name, about, found, fall_of(base[base["split"] != "train"], window[window["split"] != "train"]))


def told(of: Pair, limits: dict[str, Any]) -> dict[str, Any]:
    """A pair's verdict, with the limits that the other pairs gave: it is not judged by itself."""
    found = {f: v.model_copy(update={"limit": limits.get(f, {}).get("limit")}) for f, v in of.findings.items()}
    word = verdict.decide(found, {}, found["staining"].because)
    families = {}
    for name, v in found.items():
        families[name] = {"status": v.status, "because": v.because, "size": v.size, "limit_of_other_pairs": v.limit}
        if v.features:
            change = f"{v.worst.words}: {v.worst.reference:.3g} to {v.worst.now:.3g} {v.worst.unit}"
            families[name] |= {"largest": change, "times_threshold": round(v.worst.ratio, 2)}
    sentence = verdict.sentence(word, f"{of.smears['smears'][1]} smears", found, {}, found["staining"].because)
    return {
        "pair": of.name,
        "verdict": word,
        "sentence": sentence,
        **of.smears,
        "families": families,
        "accuracy": of.accuracy,
    }


def overrides_of(cells: pd.DataFrame) -> dict[str, Any]:
    """What reviewers would change if the recogniser is as good as on the cells of its own sites that it was not trained on: the
    upper end of the 95 % interval of its errors, patients resampled, at the site where it is highest. Of cells that it named."""
    highest: dict[str, Any] = {"limit": 0.0}
    cells = cells[cells["named"].astype(bool)] if "named" in cells else cells
    for site, part in cells[(cells["split"] != "train") & cells["true_type"].notna()].groupby("site"):
        if (cells.loc[cells["site"] == site, "split"] != "train").all():
            continue
        words = vocabulary.load()
        wrong = [p not in words.children(t) for t, p in zip(part["true_type"], part["predicted_type"], strict=True)]
        table = pd.DataFrame({"wrong": wrong, "all": 1, "unit": part["patient"].fillna(part["sha256"])})
        sums = table.groupby("unit")[["wrong", "all"]].sum().to_numpy(float)
        draws = sums[np.random.default_rng(7).integers(0, len(sums), (RESAMPLES, len(sums)))].sum(axis=1)
        high = round(float(np.quantile(draws[:, 0] / draws[:, 1], 0.975)), 4)
        if high > highest["limit"]:
            whose = f" of {len(sums)} patients" if part["patient"].notna().all() else ""
            share = f"{100 * np.mean(wrong):.1f} % of {len(part)} cells{whose} of {site} named wrongly"
            highest = {"limit": high, "measured_on": f"{share}; the upper end of its 95 % interval"}
    return highest


def fall_of(base: pd.DataFrame, window: pd.DataFrame) -> dict[str, Any] | None:
    """Mean sensitivity over the types (as both label them: parents) that both hold at least 10 of, there and here, since the
    mix differs; the fall with its 95 % interval, patients (cells, where there are none) resampled."""
    parent = {c: p for p, children in vocabulary.load().parents.items() for c in children}
    tables = []
    for cells in (base, window):
        scored = cells[cells["true_type"].notna()]
        truth = scored["true_type"].map(lambda t: parent.get(t, t))
        right = truth == scored["predicted_type"].map(lambda t: parent.get(t, t))
        tables.append(pd.DataFrame({"type": truth, "right": right, "unit": scored["patient"].fillna(scored["sha256"])}))
    counts = [t["type"].value_counts() for t in tables]
    common = sorted(t for t in counts[0].index.intersection(counts[1].index) if min(c[t] for c in counts) >= 10)
    if not common:
        return None
    random, values, draws = np.random.default_rng(7), [], []
    for table in tables:
        table = table[table["type"].isin(common)]
        units, place = np.unique(table["unit"].astype(str), return_inverse=True)
        codes = table["type"].map({t: i for i, t in enumerate(common)}).to_numpy()
        right = table["right"].to_numpy(float)
        all_, hits = (np.zeros((len(units), len(common))) for _ in range(2))
        np.add.at(all_, (place, codes), 1)
        np.add.at(hits, (place, codes), right)
        weights = random.multinomial(len(units), np.full(len(units), 1 / len(units)), RESAMPLES)
        values.append(float((hits.sum(axis=0) / all_.sum(axis=0)).mean()))
        with np.errstate(invalid="ignore"):
            draws.append(np.nanmean((weights @ hits) / (weights @ all_), axis=1))
    low, high = np.quantile(draws[0] - draws[1], [0.025, 0.975])
    numbers = zip(("there", "here", "fall", "low", "high"), (*values, values[0] - values[1], low, high), strict=True)
    return {"types": common, **{name: round(float(value), 4) for name, value in numbers}}


def limits_of(pairs: list[Pair]) -> dict[str, Any]:
    """From which shift on accuracy was seen to fall: the smallest with which it fell that is larger than every shift with which
    it did not. A fall at a smaller shift is told beside it: the shift alone did not foretell it."""
    found: dict[str, Any] = {}
    for family in ("staining", "confidence", "embedding"):
        sized = [
            (p.findings[family].size or 0.0, p) for p in pairs if p.accuracy and p.findings[family].size is not None
        ]
        kept = max((size for size, p in sized if not p.fell), default=0.0)
        fell = sorted((size, p.name, p.accuracy or {}) for size, p in sized if p.fell)
        if beyond := [size for size, *_ in fell if size > kept]:
            falls = [
                f"{n}: mean sensitivity {a['there']:.2f} to {a['here']:.2f} at a shift of {s:.3f}" for s, n, a in fell
            ]
            found[family] = {
                "limit": round(beyond[0], 4),
                "measured_on": "; ".join(falls),
                "no_fall_up_to": round(kept, 4),
            }
    return found


def write_limits(found: dict[str, Any]) -> None:
    path = Path(str(files("monitoring").joinpath("limits.yaml")))
    text = path.read_text(encoding="utf-8")
    head = "".join(line + "\n" for line in text.splitlines() if line.startswith("#"))
    table = yaml.safe_load(text)
    for family, values in found.items():
        table[family] = {"unit": table[family]["unit"], **values}
    path.write_text(head + yaml.safe_dump(table, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
