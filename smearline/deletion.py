"""A patient's right to be deleted: at once from what the data set shows (`forget`), then from its bytes (`compact`). Either may be
killed: it is run again. Whose a row is, and what old versions and remotes keep: docs/deletion.md.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
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
    "patients": "labels/patients-*.parquet",
}
_WHOSE = ["site", "patient", "smear"]


def forget(
    directory: Path,
    site: str,
    patient: str,
    reason: str,
    now: datetime,
    *,
    smears: Collection[str] = (),
    images: Mapping[str, str | None] = {},
    known: bool = False,
) -> dict[str, int]:
    """Delete a patient, by pseudonym, from the current version of a data set, and take in nothing of his any more.

    Args:
        smears: of his that others know of (the case store); pseudonyms.
        images: those that they know as his (SHA-256), and the smear of each; one that names no patient here is his.
        known: whether others know him, so that he is written down though the data set does not.

    Returns:
        How many images went, and how many rows of each kind; and how many smears of his another patient has too, so that rows of
        them that name no patient stay. A patient who was forgotten before gives zeros.

    Raises:
        DataError: nobody knows such a patient.
    """
    dataset.cells_folder(directory)
    with only_one(directory):
        his, others = _smears(directory, site, patient)
        his |= set(smears)
        him = dataset.person(site, "patient", patient)
        people = {him}
        if not (known or his or people <= dataset.Forgotten(directory).people):
            raise DataError(f"{directory} knows no patient '{patient}' at site '{site}'")
        people |= {dataset.person(site, "smear", smear) for smear in his - others if smear}
        written = [{"person": who, "deleted_at": now, "reason": reason} for who in sorted(people)]
        dataset.merge_rows(dataset.deleted_path(directory, "people"), written, dataset.PEOPLE, ["person"])
        copies = {sha256: him for sha256, smear in images.items() if not smear or smear not in others}
        return {**_finish(directory, copies), "shared_smears": len({smear for smear in his & others if smear})}


def compact(directory: Path, progress: Callable[[int, int], object] = lambda *_: None) -> dict[str, int]:
    """Rewrite the shards that hold images of deleted patients, without those.

    Returns:
        shards rewritten, images and bytes that went.
    """
    dataset.cells_folder(directory)
    done = Counter(shards=0, images=0, bytes=0)
    with only_one(directory):
        _finish(directory)  # what a `forget` that was killed left
        gone, found = dataset.deleted(directory), dataset.shards(directory)
        for number, shard in enumerate(found, 1):
            progress(number, len(found))
            sha256s = pq.read_table(shard, columns=["sha256"])["sha256"]
            going = pc.sum(pc.is_in(sha256s, pa.array(gone, pa.string()))).as_py() or 0
            site = shard.stem.rsplit("-", 1)[0]
            if going:
                size, rows = shard.stat().st_size, dataset.without(pq.read_table(shard), gone)
                if len(rows):
                    dataset.write_shard(shard.parent, site, rows, name=shard.name)  # in its place, and named anew below
                else:
                    shard.unlink()
                sha256s = rows["sha256"]
                left = shard.stat().st_size if len(rows) else 0
                done.update(shards=1, images=going, bytes=size - left)
            if len(sha256s) and shard.name != (name := dataset.shard_name(site, sha256s.to_pylist())):
                shard.rename(shard.with_name(name))
    return dict(done)


def _smears(directory: Path, site: str, patient: str) -> tuple[set[str | None], set[str | None]]:
    """(his, other patients') of the smears that a table or shard of the site names, None among them."""
    his: set[str | None] = set()
    others: set[str | None] = set()
    tables = [table for _, table in dataset.shard_tables(directory, _WHOSE)]
    tables += [table for what, path, table in _tables(directory) if what != "labels"]
    for table in tables:
        mine = table.filter(pc.and_(pc.equal(table["site"], site), pc.is_valid(table["patient"])))
        for row in mine.group_by(["patient", "smear"]).aggregate([]).to_pylist():
            (his if row["patient"] == patient else others).add(row["smear"])
    return his, others


def _finish(directory: Path, copies: Mapping[str, str] = {}) -> dict[str, int]:
    """Write down the images of everybody who was forgotten, and take them and their rows out of every table; how many went.
    `copies`: images of which others have a copy that is one of these people's, and whose."""
    path = dataset.deleted_path(directory, "people")
    told = pq.read_table(path, schema=dataset.PEOPLE).to_pylist() if path.exists() else []
    forgotten = dataset.Forgotten(directory)
    new: list[dict[str, Any]] = []
    if told:
        why = {row["person"]: {"deleted_at": row["deleted_at"], "reason": row["reason"]} for row in told}
        copies = {**copies, **_copies(directory, forgotten)}
        for _, table in dataset.shard_tables(directory, ["sha256", *_WHOSE]):
            nobodys = pc.and_(pc.is_null(table["patient"]), pc.is_in(table["sha256"], pa.array(copies, pa.string())))
            for row in table.filter(pc.or_(nobodys, pa.array(_of_people(table, forgotten)))).to_pylist():
                if row["sha256"] not in forgotten.images:
                    who = forgotten.who(row["site"], row["patient"], row["smear"])
                    who = who if who in why else copies[row["sha256"]]
                    new.append({"sha256": row["sha256"], "site": row["site"], **why[who]})
    if new:
        dataset.merge_rows(dataset.deleted_path(directory, "images"), new, dataset.DELETED, ["sha256"])
    images, done = pa.array(sorted(dataset.deleted(directory)), pa.string()), dict.fromkeys(_SWEPT, 0)
    for what, path, table in _tables(directory):
        gone = np.zeros(len(table), bool)
        if "sha256" in table.column_names:
            gone |= pc.is_in(table["sha256"], images).to_numpy()
        if "patient" in table.column_names:
            gone |= _of_people(table, forgotten)
        if what == "quarantined":  # that a deleted image came again is told without a name
            gone &= pc.not_equal(table["reason"], "deleted").to_numpy()
        if gone.any():
            kept = table.filter(pa.array(~gone))
            dataset.write_table(kept.drop_columns("site") if what == "paths" else kept, path, compression="zstd")
            done[what] += int(gone.sum())
    return {"images": len(new), **done}


def _copies(directory: Path, forgotten: dataset.Forgotten) -> dict[str, str]:
    """Images of which a copy was said to be one of these people's, and whose: the shard holds the first, which may name nobody."""
    found = {}
    for what, _, table in _tables(directory):
        if what in ("quarantined", "paths"):
            for row in table.filter(pa.array(_of_people(table, forgotten))).select(["sha256", *_WHOSE]).to_pylist():
                found[row["sha256"]] = str(forgotten.who(row["site"], row["patient"], row["smear"]))
    return found


def _tables(directory: Path) -> Iterator[tuple[str, Path, pa.Table]]:
    """Every table that may name a patient; one of paths is one site's."""
    for what, pattern in _SWEPT.items():
        for path in sorted(directory.glob(pattern)):
            schema = {"quarantined": dataset.QUARANTINE, "paths": dataset.FILES}.get(what)
            table = pq.read_table(path, schema=schema)
            if what == "paths":
                site = path.stem.split("-", 1)[1]
                table = table.append_column("site", pa.array([site] * len(table), pa.string()))
            yield what, path, table


def _of_people(table: pa.Table, forgotten: dataset.Forgotten) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows are these people's."""
    whose = list(zip(*(table[name].to_pylist() for name in _WHOSE), strict=True))
    gone = {who: forgotten.has(*who) for who in set(whose)}
    return np.array([gone[who] for who in whose], bool)
