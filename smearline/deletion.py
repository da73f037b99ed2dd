"""A patient's right to be deleted: at once from what the data set shows, then from its bytes.

`forget` removes labels, blood counts and names, and writes down which images are gone; no reader sees them any more. `compact`
rewrites the shards that still hold their bytes, and no others. What old versions and remotes keep: docs/deletion.md.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smearline import cbc, dataset
from smearline.errors import DataError
from smearline.import_folders import only_one


def forget(directory: Path, site: str, patient: str, reason: str, now: datetime) -> dict[str, int]:
    """Delete a patient, by pseudonym, from the current version of a data set.

    Returns:
        How many images, labels, rows of patients and blood-count values went. A patient who was forgotten before gives zeros.

    Raises:
        DataError: the data set knows no such patient.
    """
    with only_one(directory):
        before = [pq.read_table(path, schema=dataset.DELETED) for path in dataset.deleted_paths(directory)]
        known = pa.concat_tables([dataset.DELETED.empty_table(), *before])
        images = sorted(_images_of(directory, site, patient) - set(known["sha256"].to_pylist()))
        if images:
            row = {"site": site, "patient": patient, "deleted_at": now, "reason": reason}
            new = pa.Table.from_pylist([{**row, "sha256": sha256} for sha256 in images], schema=dataset.DELETED)
            path = dataset.cells_folder(directory) / "deleted" / "images.parquet"
            dataset.write_table(pa.concat_tables([known, new]), path, compression="zstd")
        gone = set(images) | set(known.filter(pc.equal(known["patient"], patient))["sha256"].to_pylist())
        done = {
            "images": len(images),
            "labels": _drop(directory, "labels/cells-*.parquet", lambda rows: rows["sha256"].isin(gone)),
            "patients": _drop(directory, "labels/patients-*.parquet", _is(site, patient)),
            "count_values": _drop(directory, "cbc/*.parquet", _is(site, patient), cbc.COUNTS),
        }
        for pattern in ("quarantine.parquet", "local/files-*.parquet"):
            _drop(directory, pattern, lambda rows: rows["sha256"].isin(gone))
    if not gone and not any(done.values()):
        raise DataError(f"{directory} knows no patient '{patient}' at site '{site}'")
    return done


def compact(directory: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Rewrite the shards that hold images of deleted patients, without those, and take the patients' pseudonyms out of the list of
    what was deleted. A run that was killed is run again.

    Returns:
        shards rewritten, images and bytes that went.
    """
    done = {"shards": 0, "images": 0, "bytes": 0}
    with only_one(directory):
        gone, found = pa.array(dataset.deleted(directory), pa.string()), dataset.shards(directory)
        for number, shard in enumerate(found, 1):
            if progress:
                progress(number, len(found))
            sha256s = pq.read_table(shard, columns=["sha256"])["sha256"]
            going = pc.sum(pc.is_in(sha256s, gone)).as_py() or 0
            site = shard.stem.rsplit("-", 1)[0]
            if going:
                size, rows = shard.stat().st_size, pq.read_table(shard)
                rows = rows.filter(pc.invert(pc.is_in(rows["sha256"], gone)))
                if len(rows):
                    dataset.write_shard(shard.parent, site, rows, name=shard.name)  # in its place, and named anew below
                else:
                    shard.unlink()
                sha256s = rows["sha256"]
                left = shard.stat().st_size if len(rows) else 0
                done = {
                    "shards": done["shards"] + 1,
                    "images": done["images"] + going,
                    "bytes": done["bytes"] + size - left,
                }
            if len(sha256s) and shard.name != (name := dataset.shard_name(site, sha256s.to_pylist())):
                shard.rename(shard.with_name(name))
        for path in dataset.deleted_paths(directory):
            table = pq.read_table(path, schema=dataset.DELETED)
            nobody = pa.nulls(len(table), pa.string())
            place = table.schema.get_field_index("patient")
            dataset.write_table(table.set_column(place, "patient", nobody), path, compression="zstd")
    return done


def _images_of(directory: Path, site: str, patient: str) -> set[str]:
    mine = [("site", "=", site), ("patient", "=", patient)]
    found = (pq.read_table(shard, columns=["sha256"], filters=mine) for shard in dataset.shards(directory))
    return {sha256 for table in found for sha256 in table["sha256"].to_pylist()}


def _is(site: str, patient: str) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda rows: (rows["site"] == site) & (rows["patient"] == patient)


def _drop(directory: Path, pattern: str, gone: Callable[[pd.DataFrame], Any], schema: pa.Schema | None = None) -> int:
    """Take rows out of the tables of a kind; how many went."""
    number = 0
    for path in sorted(directory.glob(pattern)):
        table = pq.read_table(path, schema=schema)
        keep = ~gone(table.to_pandas())
        if not keep.all():
            dataset.write_table(table.filter(pa.array(keep)), path, compression="zstd")
            number += int((~keep).sum())
    return number
