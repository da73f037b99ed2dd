"""Labels from a table, for images that are in the data set: what an expert read again, or resolved."""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from smearline import dataset, lookup, vocabulary
from smearline.errors import DataError, nearest
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
    dataset.cells_folder(directory)
    frame = _read(table)
    known = ["type", *words.characteristics]
    if "sha256" not in frame:
        raise DataError(f"{table} has no column sha256; it has {', '.join(map(str, frame.columns))}")
    if unknown := [str(c) for c in frame.columns if c not in ("sha256", *known)]:
        raise DataError(
            f"{table} has a column '{unknown[0]}', which is no label; nearest: {nearest(unknown[0], known)}"
        )
    frame["sha256"] = frame["sha256"].astype(str).str.strip()
    if bad := [s for s in frame["sha256"] if not re.fullmatch("[0-9a-f]{64}", s)]:
        raise DataError(f"{table}: '{bad[0]}' is no SHA-256 (64 hexadecimal digits in lower case); nothing was taken")
    if frame["sha256"].duplicated().any():
        raise DataError(f"{table} names the image {frame.loc[frame['sha256'].duplicated(), 'sha256'].iloc[0]} twice")
    code = {name: _codes(frame[name], name) for name in known if name in frame}
    with only_one(directory):
        there = lookup.Known(directory).find(list(frame["sha256"]), ["site"])
        gone = set(dataset.deleted(directory))
        if strangers := [s for s in frame["sha256"] if there.get(s) != (site,) or s in gone]:
            raise DataError(
                f"{table} names {len(strangers)} images that site '{site}' does not have, {strangers[0]} for one; "
                "nothing was taken"
            )
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
        sites = {path.name.split(".")[0].removeprefix("cells-") for path in dataset.label_paths(directory)}
        for other in sorted(sites - {site}):
            # the same picture may have come as another site's file, and be labelled there
            went += dataset.merge_labels(directory, other, dataset.LABELS.empty_table(), superseded, frame["sha256"])
    return {"labels": len(rows), "superseded": went}


def count(directory: Path) -> tuple[int, int]:
    """How many labels there are, and how many images whose labels contradict each other."""
    paths = dataset.label_paths(directory)
    total = sum(pq.read_metadata(path).num_rows for path in paths)
    bits = [np.unique(lookup.bits(pq.read_table(path, columns=["sha256"])["sha256"])) for path in paths]
    values, counts = np.unique(np.concatenate([np.empty(0, np.uint64), *bits]), return_counts=True)
    shared = values[counts > 1]  # labelled at two sites: whether they agree is told over all tables
    marked: set[str] = set()
    both = []
    for path, mine in zip(paths, bits, strict=True):
        marked |= set(
            pq.read_table(path, columns=["sha256"], filters=[("conflicted", "=", True)])["sha256"].to_pylist()
        )
        if np.isin(mine, shared).any():
            table = pq.read_table(path, schema=dataset.LABELS)
            both.append(table.filter(pa.array(np.isin(lookup.bits(table["sha256"]), shared))))
    if both:
        labels = pa.concat_tables(both).to_pandas()
        marked |= set(labels.loc[dataset.conflicted(labels), "sha256"])
    return total, len(marked)


def _read(table: Path) -> pd.DataFrame:
    try:
        if table.suffix == ".parquet":
            return pd.read_parquet(table)
        return pd.read_csv(table, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, pa.ArrowException) as error:  # pandas' and UTF-8's errors are ValueErrors
        raise DataError(f"{table} cannot be read as a table (CSV in UTF-8, or Parquet): {error}") from error


def _codes(values: pd.Series, name: str) -> list[str]:
    words = vocabulary.load()
    check = words.type_code if name == "type" else lambda v: words.characteristic_value(name, v)
    said = values.fillna("").astype(str).str.strip()
    meaning = {value: check(value) if value else "" for value in said.unique()}
    return [str(meaning[value]) for value in said]
