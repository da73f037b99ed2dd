"""Cells to a row a smear, in five families of features that are judged apart.

    staining    medians of smearline.staining over the smear's cells; the nucleus on segmented neutrophils alone, since its
                colour differs by type of cell (on 5 to 10 of them; missing where there are fewer); and the share of cells that
                show red cells, and a stained nucleus, at all: of a stain that has faded away nothing else can be measured
    optics      medians, likewise
    mix         share_<TYPE>, of all the smear's cells, by the network's own answers (type_untempered) where a log has them, as
                all grouping by type here; served_<TYPE>, which is no feature, is the share as it was answered
    confidence  confidence_mean (probability of the type named), confidence_uncertain (share of cells below 0.5), both as they
                would be with the reference's mix of types; confidence_unidentified (share named UNIDENTIFIED)
    embedding   embedding_distance: how far the smear's cells lie from the reference's cells of the same predicted type, in
                units of the spread of single cells about their type; 0 is no farther than chance

Blood with more blasts has another mean confidence and another mean embedding without any fault: both are compared within
the predicted type, so that what is left is the picture and not the patient.
"""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Self

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray

from smearline import vocabulary
from smearline.errors import DataError
from smearline.staining import OPTICS, STAINING

LEAST_CELLS = 20
"""A smear with fewer cells is left out; the verdict counts it."""
LEAST_MEASURED = 5
"""A median of fewer crops is not taken: of a faded stain only the odd crop is still measured, and that one is no witness."""
LEAST_NEUTROPHILS, MOST_NEUTROPHILS = 5, 10
"""Of a smear with more the first ten are taken: else the smears of a ward with few neutrophils would differ more among
themselves, and that alone would be called a change of stain."""
PSEUDO_CELLS = 50
UNCERTAIN_BELOW = 0.5
_LEAST_OF_TYPE = 10
"""A type with fewer cells in the reference has no centre: its cells say nothing of confidence and embedding."""
CONFIDENCE = ("confidence_mean", "confidence_uncertain", "confidence_unidentified")
DISTANCE = "embedding_distance"
NUCLEUS = [name for name in STAINING if "nucleus" in name]
SEEN = ("stain_red_cell_seen", "stain_nucleus_seen")
ALWAYS_SHOWN = (*(name for name in (*STAINING, *OPTICS) if name not in NUCLEUS),)
"""What every smear shows, whatever the disease: where it is gone, something is wrong."""
NEEDS_RECOGNISER = ("mix", "confidence", "embedding")

Floats = NDArray[np.float64]


def families() -> dict[str, tuple[str, ...]]:
    """The features of each family, in the order of the page."""
    shares = tuple(f"share_{t}" for t in vocabulary.load().types if t != "UNIDENTIFIED")
    return {
        "staining": (*STAINING, *SEEN),
        "optics": OPTICS,
        "mix": shares,
        "confidence": CONFIDENCE,
        "embedding": (DISTANCE,),
    }


@dataclass(frozen=True)
class Description:
    """What a reader calls a feature (features.yaml)."""

    words: str
    unit: str
    floor: float
    """A shift smaller than this is nothing to a reader, however sure it is; in the feature's own unit."""

    @property
    def factor(self) -> int:
        return 100 if self.unit == "%" else 1


@cache
def describe(name: str) -> Description:
    table = yaml.safe_load(files(__package__).joinpath("features.yaml").read_text(encoding="utf-8"))
    if name.startswith("share_"):
        return Description(words=vocabulary.load().names[name[6:]], **table["share"])
    return Description(**table[name])


@dataclass(frozen=True)
class Centres:
    """What the reference's cells of each predicted type are like: T types, F = confidence, uncertain, then the embedding."""

    types: tuple[str, ...]
    count_T: Floats
    sum_TF: Floats
    spread: float
    """Root mean square distance of a cell's embedding from its type's centre."""

    @classmethod
    def of(cls, cells: pd.DataFrame) -> Self:
        types = tuple(vocabulary.load().types)
        codes, values = _codes(cells, types), _values(cells)
        count, total = _sums(codes, values, len(types))
        rest = values - (total / np.maximum(count, 1)[:, None])[codes]
        return cls(types, count, total, float(np.sqrt((rest[:, 2:] ** 2).sum(axis=1).mean())) or 1.0)

    def residuals(self, cells: pd.DataFrame, blocks: NDArray[np.int64] | None = None) -> Floats:
        """Cells (N) less the centre of their type: N x F, NaN where the type has none.

        blocks: of the reference's own cells; each cell is then compared with the cells of the other blocks only.
        """
        codes, values = _codes(cells, self.types), _values(cells)
        if values.shape[1] != self.sum_TF.shape[1]:
            raise DataError(
                f"embeddings of {values.shape[1] - 2} numbers cannot be compared with a reference of {self.sum_TF.shape[1] - 2}"
            )
        if blocks is None:
            count, total = self.count_T[codes], self.sum_TF[codes]
        else:
            place = blocks * len(self.types) + codes
            own_count, own_total = _sums(place, values, (int(blocks.max()) + 1) * len(self.types))
            count, total = self.count_T[codes] - own_count[place], self.sum_TF[codes] - own_total[place]
        rest = values - total / np.maximum(count, 1)[:, None]
        rest[count < _LEAST_OF_TYPE] = np.nan
        return rest

    @property
    def mean_F(self) -> Floats:
        return self.sum_TF.sum(axis=0) / max(self.count_T.sum(), 1.0)


def _own_type(cells: pd.DataFrame) -> pd.Series:
    """The network's own answer, where it is known: a mix or a temperature of one site alone would look like drift."""
    if "type_untempered" not in cells:
        return cells["predicted_type"]
    return cells["type_untempered"].where(cells["type_untempered"].notna(), cells["predicted_type"])


def _codes(cells: pd.DataFrame, types: tuple[str, ...]) -> NDArray[np.int64]:
    return pd.Categorical(_own_type(cells), categories=types).codes.astype(np.int64)


def _values(cells: pd.DataFrame) -> Floats:
    confidence = cells[[f"p_{t}" for t in vocabulary.load().types]].to_numpy(float).max(axis=1)
    if "probability_untempered" in cells:  # a temperature of one site alone would look like drift
        own = cells["probability_untempered"].to_numpy(float, na_value=np.nan)
        confidence = np.where(np.isnan(own), confidence, own)
    embedding = np.stack([np.asarray(e, float) for e in cells["embedding"]])
    return np.column_stack([confidence, confidence < UNCERTAIN_BELOW, embedding])


def _sums(place: NDArray[np.int64], values: Floats, size: int) -> tuple[Floats, Floats]:
    total = np.zeros((size, values.shape[1]))
    np.add.at(total, place, values)
    return np.bincount(place, minlength=size).astype(float), total


def named(cells: pd.DataFrame, pseudo_cells: int = PSEUDO_CELLS) -> pd.DataFrame:
    """The cells, each once, with `day` (YYYY-MM-DD or null), `smear` and `pseudo`.

    Cells without a smear are cut into pseudo-smears of `pseudo_cells`, day by day in the order in which they are stored. Where
    no day is known that is the order of files in folders, often by label: then they go in the order of their digests.
    """
    cells = cells.drop_duplicates(["site", "smear", "sha256"], keep="last").reset_index(drop=True)
    day = cells["day"] if "day" in cells else pd.to_datetime(cells["acquired_at"], utc=True).dt.strftime("%Y-%m-%d")
    cells = cells.assign(day=day.astype(object).where(day.notna(), None), pseudo=cells["smear"].isna())
    loose = cells[cells["pseudo"]]
    order = loose["sha256"].where(loose["day"].isna(), "")
    loose = loose.assign(order=order).sort_values("order", kind="stable")
    keys = [loose["site"], loose["day"].fillna(""), loose["split"].eq("train") if "split" in loose else loose["pseudo"]]
    number = loose.groupby(keys, sort=False).cumcount() // pseudo_cells
    name = ["cells-" + "-".join(filter(None, map(str, key))) for key in zip(*keys[1:], number, strict=True)]
    smear = cells["smear"].astype(object)
    smear[loose.index] = name
    return cells.assign(smear=smear)


def by_smear(cells: pd.DataFrame, centres: Centres | None, blocks: NDArray[np.int64] | None = None) -> pd.DataFrame:
    """`named` cells to a row a smear: site, smear, patient, day (the last on which cells of it came), pseudo, seen, num_cells
    and `families`.

    Args:
        centres: of the reference; None leaves confidence and embedding missing.
        blocks: of each cell, where the cells are the reference's own (`Centres.residuals`).
    """
    words, rows = vocabulary.load(), []
    rest = None if centres is None else centres.residuals(cells, blocks)
    for (site, smear), places in sorted(cells.groupby(["site", "smear"]).indices.items()):
        part = cells.iloc[places]
        if len(part) < LEAST_CELLS:
            continue
        measured, own = part[[*STAINING, *OPTICS]], _own_type(part)
        neutrophils = measured.loc[own == "NEUT_SEG", NUCLEUS]
        colours = measured.median().where(measured.notna().sum() >= LEAST_MEASURED)
        colours[NUCLEUS] = neutrophils.head(MOST_NEUTROPHILS if len(neutrophils) >= LEAST_NEUTROPHILS else 0).median()
        seen_here = {name: float(part[f"{name.removesuffix('_seen')}_R"].notna().mean()) for name in SEEN}
        shares, served = (
            types.value_counts(normalize=True).reindex(words.types, fill_value=0.0)
            for types in (own, part["predicted_type"])
        )
        days, whose = part["day"].dropna(), part["patient"].dropna()
        row: dict[str, Any] = {"site": site, "smear": smear, "pseudo": part["pseudo"].iloc[0]}
        row |= {
            "patient": whose.iloc[0] if len(whose) and not row["pseudo"] else None,
            "day": days.max() if len(days) else None,
        }
        row |= {"seen": bool((part["split"] == "train").any()) if "split" in part else False}
        row |= {"num_cells": len(part), **colours, **seen_here}
        row |= {f"share_{t}": shares[t] for t in words.types if t != "UNIDENTIFIED"}
        row |= {f"served_{t}": served[t] for t in words.types}
        row |= dict.fromkeys((*CONFIDENCE, DISTANCE), np.nan)
        if rest is not None and centres is not None:
            row |= _within_type(rest[places], centres) | {"confidence_unidentified": shares["UNIDENTIFIED"]}
        rows.append(row)
    columns = ["site", "smear", "patient", "day", "pseudo", "seen", "num_cells"]
    columns += [f"served_{t}" for t in words.types]
    return pd.DataFrame(rows, columns=[*columns, *(f for names in families().values() for f in names)])


def _within_type(rest_NF: Floats, centres: Centres) -> dict[str, float]:
    known = rest_NF[~np.isnan(rest_NF[:, 0])]
    if len(known) < LEAST_CELLS // 2:
        return {}
    confidence, uncertain = np.clip(centres.mean_F[:2] + known[:, :2].mean(axis=0), 0, 1)
    e = known[:, 2:]
    # Mean inner product of different cells: unlike the squared mean it does not grow as the cells become fewer.
    squared = ((e.sum(axis=0) ** 2).sum() - (e**2).sum()) / (len(e) * (len(e) - 1))
    distance = np.sqrt(max(squared, 0)) / centres.spread
    return {"confidence_mean": confidence, "confidence_uncertain": uncertain, DISTANCE: distance}
