"""Labels from a table, for images that are in the data set: what an expert read again, or resolved."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smearline import dataset, lookup, vocabulary
from smearline.errors import DataError, VocabularyError, nearest
from smearline.import_folders import only_one


def label(
    directory: Path, site: str, table: Path, by: str, now: datetime, *, supersede: bool = False
) -> dict[str, int]:
    """Take labels in: a CSV or Parquet file with `sha256` and any of `type` and the characteristics; a blank says nothing.

    Args:
        by: who says so: a role or a pseudonym.
        supersede: what was said before of the same image and name goes (older versions keep it); otherwise both stay, and where
            they differ the image is in conflict and left out of training and scoring.

    Returns:
        labels that were taken, and labels superseded.

    Raises:
        DataError: no sha256 column, a column that is none of these, an image twice, or images that the site does not have.
        VocabularyError: a value is not the vocabulary's.
    """
    words = vocabulary.load()
    frame = (
        pd.read_parquet(table) if table.suffix == ".parquet" else pd.read_csv(table, dtype=str, keep_default_na=False)
    )
    known = ["type", *words.characteristics]
    if "sha256" not in frame:
        raise DataError(f"{table} has no column sha256; it has {', '.join(map(str, frame.columns))}")
    if unknown := [str(c) for c in frame.columns if c not in ("sha256", *known)]:
        raise DataError(
            f"{table} has a column '{unknown[0]}', which is no label; nearest: {nearest(unknown[0], known)}"
        )
    if frame["sha256"].duplicated().any():
        raise DataError(f"{table} names the image {frame.loc[frame['sha256'].duplicated(), 'sha256'].iloc[0]} twice")
    code = {name: _codes(frame[name], name) for name in known if name in frame}
    with only_one(directory):
        there = lookup.Known(directory).find(list(frame["sha256"]), ["site"])
        gone = set(dataset.deleted(directory))
        _refuse_strangers(table, site, [s for s in frame["sha256"] if there.get(s) != (site,) or s in gone])
        common = {"labelled_by": by, "labelled_at": now, "role": "reference", "vocabulary": words.version}
        common |= {"source": "labels", "conflicted": False}
        rows = [
            {"sha256": sha256, "name": name, "value": value, "source_label": value, **common}
            for name, values in code.items()
            for sha256, value in zip(frame["sha256"], values, strict=True)
            if value
        ]
        named = {(row["sha256"], row["name"]): row["value"] for row in rows}

        def superseded(old: Any) -> bool:
            of_mine = supersede or (old.source, old.labelled_by) == ("labels", by)
            return of_mine and old.role == "reference" and named.get((old.sha256, old.name), old.value) != old.value

        went = dataset.merge_labels(directory, site, pa.Table.from_pylist(rows, schema=dataset.LABELS), superseded)
    return {"labels": len(rows), "superseded": went}


def count(directory: Path) -> tuple[int, int]:
    """How many labels there are, and how many images whose labels contradict each other."""
    paths = sorted(directory.glob("labels/cells-*.parquet"))
    total = sum(pq.read_metadata(path).num_rows for path in paths)
    images = [np.unique(lookup.bits(pq.read_table(path, columns=["sha256"])["sha256"])) for path in paths]
    if paths and len(np.unique(np.concatenate(images))) < sum(map(len, images)):  # an image is labelled at two sites
        labels = dataset.read_labels(directory)
        return total, int(labels.loc[labels["conflicted"], "sha256"].nunique())
    marked = (pq.read_table(path, columns=["sha256"], filters=[("conflicted", "=", True)]) for path in paths)
    return total, sum(len(pc.unique(table["sha256"])) for table in marked)


def _codes(values: pd.Series, name: str) -> list[str]:
    words = vocabulary.load()
    check = words.type_code if name == "type" else lambda v: words.characteristic_value(name, v)
    said = values.fillna("").astype(str).str.strip()
    meaning = {value: check(value) if value else "" for value in said.unique()}
    if none := [value for value, code in meaning.items() if value and not code]:
        raise VocabularyError(f"'{none[0]}' is no value of {name}")
    return [str(meaning[value]) for value in said]


def _refuse_strangers(table: Path, site: str, strangers: Collection[str]) -> None:
    if strangers:
        raise DataError(
            f"{table} names {len(strangers)} images that site '{site}' does not have, {next(iter(strangers))} for one; "
            "nothing was taken"
        )
