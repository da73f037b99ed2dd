"""The evaluated cells as checked arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from smearline.errors import DataError, nearest
from smearline.metrics.codes import codes

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

REQUIRED = ("sha256", "site", "patient", "smear", "true_type", "predicted_type", "scale_assumed")
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Cells:
    """N cells, ordered by sha256 so that the order of the table changes no figure."""

    frame: pd.DataFrame
    label_N: Ints
    """Index of the true code in `codes().codes`; -1 where the cell is not labelled."""
    predicted_N: Ints
    """Index in `codes().types`."""
    probability_NK: Floats
    """0 in the column of a type that the model was not trained on."""
    cluster_N: Ints
    """The patient (within its site); a cell without a patient is its own cluster."""
    trained_types: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.label_N)

    @property
    def site_N(self) -> NDArray[np.object_]:
        return np.asarray(self.frame["site"], dtype=object)

    @property
    def has_patient_N(self) -> NDArray[np.bool_]:
        return np.asarray(self.frame["patient"].notna(), dtype=bool)

    @property
    def interval_by(self) -> str:
        """What the intervals resample: 'patient', 'cell' (no patient is known) or 'patient, else cell'."""
        known = self.has_patient_N
        return "patient" if known.all() else "patient, else cell" if known.any() else "cell"

    def take(self, mask_N: NDArray[np.bool_]) -> Cells:
        """The cells where the mask is True."""
        return Cells(
            self.frame[mask_N],
            self.label_N[mask_N],
            self.predicted_N[mask_N],
            self.probability_NK[mask_N],
            self.cluster_N[mask_N],
            self.trained_types,
        )


def num_patients(cells: Cells) -> int:
    """Distinct patients among the cells; cells without a patient do not count."""
    return len(np.unique(cells.cluster_N[cells.has_patient_N]))


def read_cells(predictions: pd.DataFrame) -> Cells:
    """Check a table of predictions (one row a cell) and turn it into arrays.

    Raises:
        DataError: a column is missing, sha256 repeats, a type code is unknown, no cell is labelled, or the
            probabilities of a cell are missing, outside 0..1 or do not sum to 1 (within 1e-3).
    """
    missing = [c for c in REQUIRED if c not in predictions.columns]
    if missing:
        raise DataError(f"the predictions lack the columns {missing}; needed are {list(REQUIRED)} and p_<TYPE>")
    frame = predictions.sort_values("sha256", kind="stable").reset_index(drop=True)
    for column in ("sha256", "site", "predicted_type"):
        if frame[column].isna().any():
            raise DataError(f"{int(frame[column].isna().sum())} predictions have no {column}; each cell needs one")
    repeated = frame.loc[frame["sha256"].duplicated(), "sha256"]
    if len(repeated):
        raise DataError(f"{len(repeated)} cells stand twice in the predictions, first {repeated.iloc[0]}; keep one row")

    known = codes()
    label_N = code_indices(frame["true_type"], known.codes, "true_type")
    if not (label_N >= 0).any():
        raise DataError(f"none of the {len(frame)} cells has a true_type; label cells before evaluating")
    predicted_N = code_indices(frame["predicted_type"], known.types, "predicted_type")
    trained = tuple(t for t in known.types if f"p_{t}" in frame.columns)
    untrained = sorted(set(frame["predicted_type"]) - set(trained))
    if untrained:
        raise DataError(f"{untrained[0]} is predicted but the predictions lack the column p_{untrained[0]}")
    probability_NK = np.zeros((len(frame), len(known.types)))
    for t in trained:
        probability_NK[:, known.types.index(t)] = frame[f"p_{t}"].to_numpy(dtype=float, na_value=np.nan)
    _check_probabilities(frame, probability_NK)

    patient = frame["patient"]
    keys = frame["site"].astype(str) + "\0" + patient.astype(str)
    keys = keys.where(patient.notna(), "\0" + frame["sha256"].astype(str))
    cluster_N = pd.factorize(keys)[0].astype(np.int64)
    return Cells(frame, label_N, predicted_N, probability_NK, cluster_N, trained)


def code_indices(column: pd.Series, known: tuple[str, ...], name: str) -> Ints:
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


def _check_probabilities(frame: pd.DataFrame, probability_NK: Floats) -> None:
    total = probability_NK.sum(axis=1)
    inside = (probability_NK >= -SUM_TOLERANCE) & (probability_NK <= 1 + SUM_TOLERANCE)  # False where NaN
    bad = ~inside.all(axis=1) | (np.abs(total - 1) > SUM_TOLERANCE)
    if bad.any():
        first = int(np.argmax(bad))
        raise DataError(
            f"{int(bad.sum())} cells have probabilities that are no distribution (first: {frame['sha256'][first]}, "
            f"sum {total[first]:.4f}); each must lie in 0..1 and their sum within {SUM_TOLERANCE} of 1"
        )
