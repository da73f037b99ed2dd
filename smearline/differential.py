"""The smear summary: what the recogniser saw on one smear, in the one form that a diagnostic model reads.

Version `summary-1`. A row a smear:
    share_<TYPE>              share of each of the 14 types among the cells that are of one of them (large platelets and
                              nucleated red cells are counted beside the white cells: share of all of the 14)
    rate_<NAME>_<VALUE>       mean probability of a characteristic's value among the cells of the types to which it applies;
                              null where no such cell was seen
    embedding                 mean of the cells' projected embeddings
    num_cells, num_counted    cells recognised, and those of one of the 14 types. They set intervals and abstention, and are
                              never a feature.
    low_<TYPE>, high_<TYPE>   95 % Clopper-Pearson interval of each share
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from smearline import dataset, vocabulary
from smearline.errors import DataError
from smearline.metrics.intervals import exact_bounds
from smearline.recognition import RecognitionModel, recognise

VERSION = "summary-1"


def summarise(predictions: pd.DataFrame, embeddings: NDArray[np.float16]) -> pd.DataFrame:
    """Predictions (a row a cell, `recognition.recognise`) and embeddings (N x E) to a row a smear.

    Cells without a smear are left out.

    Raises:
        DataError: no cell belongs to a smear, or a smear's cells are of several patients.
    """
    words = vocabulary.load()
    known = predictions["smear"].notna()
    if not known.any():
        raise DataError(
            "no cell names its smear, so there is no differential; import with a smear (labels.csv, column smear)"
        )
    cells, vectors = predictions[known].reset_index(drop=True), embeddings[known.to_numpy()].astype(np.float32)
    types = list(words.differential_types)
    rows = []
    for (site, smear), positions in cells.groupby(["site", "smear"], sort=True).indices.items():
        part = cells.iloc[positions]
        if part["patient"].nunique() > 1:
            raise DataError(
                f"smear {smear} of site '{site}' has cells of {part['patient'].nunique()} patients: a differential would be of "
                "both; import them anew, each smear with a number of its own"
            )
        counts = part["predicted_type"].value_counts().reindex(types, fill_value=0).to_numpy()
        total = int(counts.sum())
        shares = counts / total if total else np.full(len(types), np.nan)
        low, high = exact_bounds(counts, np.full(len(types), total))
        row = {"site": site, "smear": smear, "patient": next(iter(part["patient"].dropna()), None)}
        row |= {"num_cells": len(part), "num_counted": total}
        for name, values in (("share", shares), ("low", low), ("high", high)):
            row |= {f"{name}_{t}": v for t, v in zip(types, values, strict=True)}
        row |= _rates(part)
        row |= {"embedding": vectors[positions].mean(axis=0), "summary_version": VERSION}
        rows.append(row | {"scale_assumed": bool(part["scale_assumed"].any())})
    return pd.DataFrame(rows)


def _rates(part: pd.DataFrame) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, characteristic in vocabulary.load().characteristics.items():
        applies = part[part["predicted_type"].isin(characteristic.applies_to)]
        for value in characteristic.values:
            if f"p_{name}_{value}" in part:
                found[f"rate_{name}_{value}"] = float(applies[f"p_{name}_{value}"].mean()) if len(applies) else None
    return found


def differential(
    model: RecognitionModel, directory: Path, out: Path, progress: Callable[[int, int], object] = lambda *_: None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Recognise a data set and write one row a smear to `out`, with its origin.

    Returns:
        The smears, and the predictions a row a cell (`recognition.recognise`) with their embedding.

    Raises:
        DataError: `out` is neither .parquet nor .csv, or no cell names its smear.
    """
    if out.suffix not in (".parquet", ".csv"):
        raise DataError(f"{out.name}: give a name that ends in .parquet or .csv")
    predictions, embeddings = recognise(model, directory, progress=progress)
    summary = summarise(predictions, embeddings)
    index = dataset.index(directory, ["site", "smear", "origin"])
    origin = index.dropna(subset=["smear"]).groupby(["site", "smear"])["origin"].first()
    summary["origin"] = [
        "simulated" if model.card.origin == "simulated" else origin[key]
        for key in zip(summary["site"], summary["smear"], strict=True)
    ]
    summary["embedding_version"] = model.embedding_version
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".csv":
        spelt = [" ".join(f"{v:.9g}" for v in e) for e in summary["embedding"]]
        summary.assign(embedding=spelt).to_csv(out, index=False)
    else:
        summary.to_parquet(out, index=False)
    return summary, predictions.assign(embedding=list(embeddings))


def read(path: Path) -> pd.DataFrame:
    """A file that `differential` wrote. Raises DataError where it is none."""
    try:
        as_written = dict.fromkeys(("site", "smear", "patient"), "string")
        frame = (
            pd.read_csv(path, dtype=as_written, keep_default_na=False, na_values=[""])
            if path.suffix == ".csv"
            else pd.read_parquet(path)
        )
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read as differentials (.parquet or .csv): {error}") from error
    if missing := {"site", "smear", "num_counted", "summary_version", "embedding"} - set(frame):
        raise DataError(
            f"{path} holds no differentials: it lacks {', '.join(sorted(missing))}; make them: smearline differential"
        )
    if path.suffix == ".csv":
        frame["embedding"] = [np.array(text.split(), np.float32) for text in frame["embedding"]]
    return frame
