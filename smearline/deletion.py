"""A patient's right to be deleted: at once from what the data set shows, then from its bytes.

`forget` writes down which images and whose are gone, then removes labels, blood counts, names and paths; no reader sees the images
any more. `compact` rewrites the shards that still hold their bytes, and no others. Either may be killed: it is run again. What
old versions and remotes keep: docs/deletion.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smearline import dataset
from smearline.errors import DataError
from smearline.import_folders import only_one

_SWEPT = {
    "labels": "labels/cells-*.parquet",
    "count_values": "cbc/*.parquet",
    "quarantined": "quarantine.parquet",
    "paths": "local/files-*.parquet",
    "patients": "labels/patients-*.parquet",  # last: till then it says which smears are his
}


def smears_of(directory: Path, site: str, patient: str) -> set[str]:
    """The smears of a patient that the data set knows; pseudonyms."""
    mine = [("site", "=", site), ("patient", "=", patient)]
    paths = [*dataset.shards(directory), *directory.glob(f"labels/patients-{site}.parquet")]
    found = (pq.read_table(path, columns=["smear"], filters=mine)["smear"].to_pylist() for path in paths)
    return {smear for smears in found for smear in smears if smear}


def forget(directory: Path, site: str, patient: str, reason: str, now: datetime) -> dict[str, int]:
    """Delete a patient, by pseudonym, from the current version of a data set, and take in nothing of his any more.

    Returns:
        How many images went, and how many rows of each kind. A patient who was forgotten before gives zeros.

    Raises:
        DataError: the data set knows no such patient.
    """
    dataset.cells_folder(directory)
    with only_one(directory):
        people = {dataset.person(site, "patient", patient)}
        known = people <= dataset.Forgotten(directory).people
        people |= {dataset.person(site, "smear", smear) for smear in smears_of(directory, site, patient)}
        named = any(_of(table, path, set(), people).any() for _, path, table in _tables(directory))
        images = sorted(_images_of(directory, site, patient) - set(dataset.deleted(directory)))
        if not (known or named or images or len(people) > 1):
            raise DataError(f"{directory} knows no patient '{patient}' at site '{site}'")
        _write_down(directory, "people", [{"person": who, "deleted_at": now} for who in sorted(people)])
        of = {"site": site, "deleted_at": now, "reason": reason}
        _write_down(directory, "images", [{**of, "sha256": sha256} for sha256 in images])
        return {"images": len(images), **_sweep(directory)}


def compact(directory: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Rewrite the shards that hold images of deleted patients, without those.

    Returns:
        shards rewritten, images and bytes that went.
    """
    dataset.cells_folder(directory)
    done = {"shards": 0, "images": 0, "bytes": 0}
    with only_one(directory):
        gone, found = pa.array(dataset.deleted(directory), pa.string()), dataset.shards(directory)
        _sweep(directory)  # a `forget` that was killed is ended
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
    return done


def _write_down(directory: Path, what: Any, rows: list[dict[str, Any]]) -> None:
    schema, key = (dataset.PEOPLE, ["person"]) if what == "people" else (dataset.DELETED, ["sha256"])
    if rows:
        dataset.merge_rows(dataset.deleted_path(directory, what), rows, schema, key)


def _images_of(directory: Path, site: str, patient: str) -> set[str]:
    mine = [("site", "=", site), ("patient", "=", patient)]
    found = (pq.read_table(shard, columns=["sha256"], filters=mine) for shard in dataset.shards(directory))
    return {sha256 for table in found for sha256 in table["sha256"].to_pylist()}


def _tables(directory: Path) -> Iterator[tuple[str, Path, pa.Table]]:
    return ((what, p, pq.read_table(p)) for what, pattern in _SWEPT.items() for p in sorted(directory.glob(pattern)))


def _sweep(directory: Path) -> dict[str, int]:
    """Take the rows of deleted images and people out of every table; how many went."""
    images, people = set(dataset.deleted(directory)), dataset.Forgotten(directory).people
    done = dict.fromkeys(_SWEPT, 0)
    for what, path, table in _tables(directory):
        gone = _of(table, path, images, people)
        if gone.any():
            dataset.write_table(table.filter(pa.array(~gone)), path, compression="zstd")
            done[what] += int(gone.sum())
    return done


def _of(table: pa.Table, path: Path, images: set[str], people: set[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows speak of these."""
    gone = np.zeros(len(table), bool)
    if "sha256" in table.column_names:
        gone |= pc.is_in(table["sha256"], pa.array(sorted(images), pa.string())).to_numpy()
    if "site" not in table.column_names:  # the table is one site's
        table = table.append_column("site", pa.array([path.stem.split("-", 1)[-1]] * len(table), pa.string()))
    for kind in {"patient", "smear"} & set(table.column_names):
        for who in table.group_by(["site", kind]).aggregate([]).to_pylist():
            if who[kind] and dataset.person(who["site"], kind, who[kind]) in people:
                gone |= (
                    pc.and_(pc.equal(table["site"], who["site"]), pc.equal(table[kind], who[kind]))
                    .fill_null(False)
                    .to_numpy()
                )
    if path.name == "quarantine.parquet":  # that a deleted image came again is told without a name
        gone &= pc.not_equal(table["reason"], "deleted").to_numpy()
    return gone
