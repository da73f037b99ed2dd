"""What a data set holds, told without reading a picture: by site, scanner, stain, type, label source, month and split."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smearline import dataset, lookup, vocabulary
from smearline.errors import DataError

UNLABELLED, CONFLICTED = "unlabelled", "conflicted"
_BY = ("site", "scanner", "stain", "origin", "source", "type", "month", "split")


def stats(directory: Path, splits: Path | None = None) -> dict[str, Any]:
    """Counts of a data set.

    Args:
        splits: splits.parquet of the stage `split`; None: without the splits.

    Returns:
        images, image_bytes, by (column to value to images), sites (images, smears and patients each), labels (by source,
        by whom and in which role), duplicates, and of each split its images, patients and how far its mix of types is from that
        of all images (total variation distance, 0 to 1).

    Raises:
        DataError: the data set holds no image, or an image twice.
    """
    images = _images(directory)
    row_of = pd.Index(lookup.bits(images["sha256"]))
    if not row_of.is_unique:
        raise DataError(f"{directory}: an image stands in it twice; smearline verify says where")
    labels = _labels(directory)
    frame = images.drop_columns(["sha256", "acquired_at"]).to_pandas()
    frame["type"] = _types(labels, row_of)
    month = pc.strftime(images["acquired_at"], format="%Y-%m").dictionary_encode()
    frame["month"] = month.to_pandas()
    told: dict[str, Any] = {}
    if splits is not None:
        known = pq.read_table(splits, columns=["sha256", "split", "group", "near_duplicate"])
        place = row_of.get_indexer(lookup.bits(known["sha256"]))
        named = known["split"].to_pandas().to_numpy(object)
        split = np.full(len(frame), "in no split", object)
        split[place[place >= 0]] = named[place >= 0]
        frame["split"] = pd.Categorical(split)
        near = known.filter(known["near_duplicate"])
        place = row_of.get_indexer(lookup.bits(near["sha256"]))
        near = near.filter(pa.array(place >= 0))  # the others were deleted since the split
        rows = frame.iloc[place[place >= 0]][["site", "patient"]]
        groups = rows.astype(str).groupby(near["group"].to_pandas().to_numpy())
        told = {
            "near": len(near),
            "near_across_patients": int((groups["patient"].nunique() > 1).sum()),
            "near_across_sites": int((groups["site"].nunique() > 1).sum()),
        }
    return {
        "images": len(frame),
        "image_bytes": sum(_image_bytes(shard) for shard in dataset.shards(directory)),
        "shards": len(dataset.shards(directory)),
        "deleted": len(dataset.deleted(directory)),
        "scale_unknown": int(frame["microns_per_px"].isna().sum()),
        "by": {column: _counts(frame[column]) for column in _BY if column in frame},
        "sites": _sites(frame),
        "labels": _label_counts(labels),
        "duplicates": _exact(directory) | told,
        "splits": _balance(frame) if splits is not None else {},
    }


def _images(directory: Path) -> pa.Table:
    words = ["site", "scanner", "stain", "origin", "source", "patient", "smear"]
    columns = ["sha256", *words, "microns_per_px", "acquired_at"]
    tables = [table for _, table in dataset.shard_tables(directory, columns, words)]
    dataset.refuse_empty(directory, tables)
    return dataset.without(pa.concat_tables(tables).unify_dictionaries(), dataset.deleted(directory))


def _labels(directory: Path) -> pa.Table:
    words = ["name", "value", "labelled_by", "role", "source"]
    paths = dataset.label_paths(directory)
    found = [pq.read_table(path, columns=["sha256", *words], read_dictionary=words) for path in paths]
    empty = dataset.LABELS.empty_table().select(["sha256", *words])
    return pa.concat_tables(found).unify_dictionaries() if found else empty


def _types(labels: pa.Table, row_of: pd.Index) -> pd.Categorical:
    """The type of each image: the finer of a parent and its child; what is said in two ways is conflicted."""
    words = vocabulary.load()
    mine = labels.filter((pc.field("name") == "type") & (pc.field("role") == "reference"))
    rows = row_of.get_indexer(lookup.bits(mine["sha256"]))
    value = pd.Categorical(mine["value"].to_pandas())
    names = [*value.categories, UNLABELLED, CONFLICTED]
    value, rows = value.codes[rows >= 0].astype(np.int16), rows[rows >= 0]
    parent = np.isin(value, [names.index(p) for p in words.parents if p in names])
    found = np.full(len(row_of), names.index(UNLABELLED), np.int16)
    found[rows[parent]] = value[parent]
    found[rows[~parent]] = value[~parent]
    agrees = np.eye(len(names), dtype=bool)
    for above, children in words.parents.items():
        for child in children:
            if above in names and child in names:
                agrees[names.index(above), names.index(child)] = True
    found[rows[~agrees[value, found[rows]]]] = names.index(CONFLICTED)
    return pd.Categorical.from_codes(found, names)


def _counts(values: pd.Series) -> dict[str, int]:
    counts = values.value_counts(dropna=False)
    return {"unknown" if pd.isna(name) else str(name): int(number) for name, number in counts.items() if number}


def _sites(frame: pd.DataFrame) -> dict[str, dict[str, int]]:
    numbers = {"images": ("site", "size"), "smears": ("smear", "nunique"), "patients": ("patient", "nunique")}
    return frame.groupby("site", observed=True).agg(**numbers).to_dict("index")


def _label_counts(labels: pa.Table) -> list[dict[str, Any]]:
    frame = labels.drop_columns(["sha256", "value"]).to_pandas()
    counts = frame.groupby(["name", "role", "source", "labelled_by"], observed=True).size()
    return counts.rename("labels").reset_index().to_dict("records")


def _exact(directory: Path) -> dict[str, int]:
    path = directory / "quarantine.parquet"
    rows = pq.read_table(path, columns=["reason", "detail"]) if path.exists() else dataset.QUARANTINE.empty_table()
    detail = rows.filter(pc.equal(rows["reason"], "duplicate"))["detail"]
    parts = {"patients": dataset.OTHER_PATIENT, "sites": dataset.OTHER_SITE.split("{")[0]}
    return {"exact": len(detail)} | {
        f"exact_across_{name}": pc.sum(pc.match_substring(detail, part)).as_py() or 0 for name, part in parts.items()
    }


def _balance(frame: pd.DataFrame) -> dict[str, dict[str, Any]]:
    def distance(some: pd.Series, every: pd.Series) -> float:
        return float((some.value_counts(normalize=True) - every.value_counts(normalize=True)).abs().sum() / 2)

    return {
        str(split): {
            "images": len(rows),
            "patients": int(rows.groupby("site", observed=True)["patient"].nunique().sum()),
            "distance": distance(rows["type"], frame["type"]),
            "distance_sites": distance(rows["site"], frame["site"]),
            "by_type": _counts(rows["type"]),
        }
        for split, rows in frame.groupby("split", observed=True)
    }


def _image_bytes(shard: Path) -> int:
    footer = pq.read_metadata(shard)
    place = footer.schema.names.index("image")
    return sum(footer.row_group(i).column(place).total_compressed_size for i in range(footer.num_row_groups))
