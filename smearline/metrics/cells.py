"""The evaluated cells as a checked table, and what a label lets one say about a prediction.

Legend of shapes: N cells, K types (columns of a confusion), R codes = types and parents (its rows).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from smearline.dataset import patients, whose
from smearline.errors import DataError, nearest
from smearline.vocabulary import load

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
REQUIRED = ("sha256", "site", "patient", "smear", "true_type", "predicted_type", "scale_assumed")
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Codes:
    """The vocabulary's codes in reading order: each parent stands behind the last of its children."""

    types: tuple[str, ...]
    codes: tuple[str, ...]
    member_RK: Bools  # code r stands for type k: a prediction k is right for a cell labelled r
    tolerated_RK: Bools  # k is right for r, or a neighbour of it; a parent tolerates a neighbour of *all* its children
    within_RR: Bools  # [r, q] a cell labelled q certainly is an r: q = r, or q is a child of the parent r
    decidable_RR: Bools  # [r, q] False where a cell labelled q may or may not be an r: q is a parent of r


@cache
def codes() -> Codes:
    vocabulary = load()
    types, order = tuple(vocabulary.types), list[str]()
    for code in types:
        order.append(code)
        order += [p for p, children in vocabulary.parents.items() if set(children) <= set(order) and p not in order]
    sets = [set(vocabulary.children(c)) for c in order]
    tolerant = [set.intersection(*({t, *vocabulary.types[t].neighbours} for t in s)) | s for s in sets]
    return Codes(
        types=types,
        codes=tuple(order),
        member_RK=np.array([[t in s for t in types] for s in sets]),
        tolerated_RK=np.array([[t in s for t in types] for s in tolerant]),
        within_RR=np.array([[q <= r for q in sets] for r in sets]),
        decidable_RR=np.array([[not r < q for q in sets] for r in sets]),
    )


def read_cells(predictions: pd.DataFrame) -> pd.DataFrame:
    """Check a table of predictions (one row a cell) and sort it by sha256, so that its order changes no figure.

    Returns:
        The table with `label` (index in `codes().codes`, -1 where the cell is not labelled), `predicted` (index in
        `codes().types`) and `cluster` (the patient within its site; else the smear, else the cell itself).

    Raises:
        DataError: a column is missing, sha256 repeats, a type code is unknown, no cell is labelled, or the
            probabilities of a cell are missing, outside 0..1 or do not sum to 1 (within 1e-3).
    """
    missing = [c for c in REQUIRED if c not in predictions.columns]
    if missing:
        raise DataError(f"the predictions lack the columns {missing}; needed are {list(REQUIRED)} and p_<TYPE>")
    cells = predictions.sort_values("sha256", kind="stable").reset_index(drop=True)
    for column in ("sha256", "site", "predicted_type"):
        if cells[column].isna().any():
            raise DataError(f"{int(cells[column].isna().sum())} predictions have no {column}; each cell needs one")
    repeated = cells.loc[cells["sha256"].duplicated(), "sha256"]
    if len(repeated):
        raise DataError(f"{len(repeated)} cells stand twice in the predictions, first {repeated.iloc[0]}; keep one row")
    known = codes()
    label_N = indices(cells["true_type"], known.codes, "true_type")
    if not (label_N >= 0).any():
        raise DataError(f"none of the {len(cells)} cells has a true_type; label cells before evaluating")
    predicted_N = indices(cells["predicted_type"], known.types, "predicted_type")
    for untrained in sorted(t for t in set(cells["predicted_type"]) if f"p_{t}" not in cells.columns):
        raise DataError(f"{untrained} is predicted but the predictions lack the column p_{untrained}")
    probability_NK = probabilities(cells)
    total_N = probability_NK.sum(axis=1)
    inside = (probability_NK >= -SUM_TOLERANCE) & (probability_NK <= 1 + SUM_TOLERANCE)  # False where NaN
    bad_N = ~inside.all(axis=1) | (np.abs(total_N - 1) > SUM_TOLERANCE)
    if bad_N.any():
        first = int(np.argmax(bad_N))
        raise DataError(
            f"{int(bad_N.sum())} cells have probabilities that are no distribution (first: {cells['sha256'][first]}, "
            f"sum {total_N[first]:.4f}); each must lie in 0..1 and their sum within {SUM_TOLERANCE} of 1"
        )
    return cells.assign(label=label_N, predicted=predicted_N, cluster=pd.factorize(whose(cells))[0])


def indices(column: pd.Series, known: tuple[str, ...], name: str) -> Ints:
    """Index of each value in `known`; -1 for null. Raises DataError for a value that is not known."""
    index = pd.Index(known).get_indexer(pd.Index(column.astype(object)))
    wrong = (index < 0) & column.notna().to_numpy(dtype=bool)
    if wrong.any():
        value = str(column[wrong].iloc[0])
        raise DataError(
            f"{name} '{value}' ({int(wrong.sum())} rows with an unknown value) is not in the vocabulary; "
            f"nearest: {nearest(value, known)}"
        )
    return np.asarray(index, dtype=np.int64)


def trained_types(cells: pd.DataFrame) -> list[str]:
    """The types that have a probability above 0 at any cell: a recogniser's tables give its untrained types 0."""
    return [t for t in codes().types if f"p_{t}" in cells.columns and (cells[f"p_{t}"] > 0).any()]


def probabilities(cells: pd.DataFrame) -> NDArray[np.float64]:
    """N x K; 0 in the column of a type that the model was not trained on."""
    frame = cells.reindex(columns=[f"p_{t}" for t in codes().types], fill_value=0.0)
    return np.ascontiguousarray(frame.to_numpy(dtype=float, na_value=np.nan))


def num_patients(cells: pd.DataFrame) -> int:
    """Distinct patients among the cells; cells without a patient do not count."""
    return int(cells.loc[cells["patient"].notna(), "cluster"].nunique())


def interval_by(cells: pd.DataFrame) -> str:
    """What the intervals resample: 'patient'; 'smear' where no patient is known, 'cell' where neither is; 'patient, else cell' and
    so on."""
    kinds = np.select([patients(cells).notna(), cells["smear"].notna()], ["patient", "smear"], "cell")
    return ", else ".join(kind for kind in ("patient", "smear", "cell") if (kinds == kind).any())
