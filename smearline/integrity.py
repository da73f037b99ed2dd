"""Is a data set whole? Every byte of every shard, every label's image, every split; and what to do where not."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smearline import dataset, images, lookup
from smearline.errors import ImageError

_READ = 1 << 22


@dataclass(frozen=True)
class Finding:
    """What is wrong, and how it is got back."""

    kind: str
    """damaged, missing, unversioned, twice, label_without_image, in_two_splits, in_no_split, undecodable."""
    where: str
    detail: str
    remedy: str
    smears: tuple[str, ...] = field(default=())
    """site/smear of what is touched, where it can still be told."""


def verify(
    directory: Path,
    *,
    expected: Mapping[str, str] | None = None,
    splits: Path | None = None,
    decode: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Finding]:
    """Everything that is wrong with a data set; nothing where it is whole.

    Args:
        expected: file of the data set (relative to it) to its MD5, as the version says; None: there is no version, and a
            flipped byte is found by the shards' own checksums, which do not cover their footers.
        splits: splits.parquet of the stage `split`.
        decode: decode every image too.
    """
    found: list[Finding] = []
    shards = dataset.shards(directory)
    names = [path.relative_to(directory).as_posix() for path in shards]
    expected = dict(expected or {})
    for name in sorted(expected.keys() - set(names)):
        if not (directory / name).is_file():
            found.append(Finding("missing", name, "the version has it, the folder does not", _remedy(directory, name)))
    parts: list[pa.Table] = []
    with ThreadPoolExecutor() as pool:
        for number, (name, (problem, rows)) in enumerate(
            zip(names, pool.map(lambda s: _shard(s, directory, expected, decode), shards), strict=True), 1
        ):
            if progress:
                progress(number, len(shards))
            if problem:
                found.append(problem)
            elif expected and name not in expected:
                found.append(
                    Finding(
                        "unversioned",
                        name,
                        "no version has it",
                        "python -m flows ingest, or dvc add data/cells",
                        _smears(rows),
                    )
                )
            if rows is not None:
                parts.append(rows)
    for name in sorted(expected.keys() - set(names)):
        path = directory / name
        if path.is_file() and _md5(path) != expected[name]:
            found.append(Finding("damaged", name, "its bytes are not those of the version", _remedy(directory, name)))
    if not parts:
        return found
    whole = pa.concat_tables(parts)
    return found + _twice(whole) + _labels(directory, whole) + (_splits(splits, directory, whole) if splits else [])


def _shard(
    path: Path, directory: Path, expected: Mapping[str, str], decode: bool
) -> tuple[Finding | None, pa.Table | None]:
    """What is wrong with a shard, and its rows (sha256, site, smear) as far as they can be read."""
    name = path.relative_to(directory).as_posix()
    rows = None
    try:
        rows = pq.read_table(path, columns=["sha256", "site", "smear"])
        if name in expected:
            if _md5(path) != expected[name]:
                return Finding(
                    "damaged", name, "its bytes are not those of the version", _remedy(directory, name), _smears(rows)
                ), rows
        else:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for _ in file.iter_batches(batch_size=4096):
                    pass
        if path.name != dataset.shard_name(path.stem.rsplit("-", 1)[0], rows["sha256"].to_pylist()):
            return Finding(
                "damaged", name, "it does not hold what its name says", _remedy(directory, name), _smears(rows)
            ), rows
        if decode:
            return _undecodable(path, directory, name, rows), rows
    except (OSError, pa.ArrowException) as error:
        return Finding("damaged", name, str(error).splitlines()[0][:200], _remedy(directory, name), _smears(rows)), rows
    return None, rows


def _undecodable(path: Path, directory: Path, name: str, rows: pa.Table) -> Finding | None:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=["sha256", "image"]):
        for sha256, data in zip(batch["sha256"].to_pylist(), batch["image"].to_pylist(), strict=True):
            try:
                images.decode(data)
            except ImageError as error:
                detail = f"image {sha256} cannot be decoded: {error}"
                mine = rows.filter(pc.equal(rows["sha256"], sha256))
                return Finding("undecodable", name, detail, _remedy(directory, name), _smears(mine))
    return None


def _twice(rows: pa.Table) -> list[Finding]:
    bits = lookup.bits(rows["sha256"])
    _, first, counts = np.unique(bits, return_index=True, return_counts=True)
    if not (counts > 1).any():
        return []
    touched = rows.take(first[counts > 1])
    remedy = "remove the shard that came last (git log data/cells.dvc says which), and import again what only it holds"
    return [Finding("twice", "cells", f"{len(touched)} images stand in two shards", remedy, _smears(touched))]


def _labels(directory: Path, rows: pa.Table) -> list[Finding]:
    there, found = np.sort(lookup.bits(rows["sha256"])), []
    for path in sorted(directory.glob("labels/cells-*.parquet")):
        name = path.relative_to(directory).as_posix()
        try:
            named = pq.read_table(path, columns=["sha256"])["sha256"]
        except (OSError, pa.ArrowException) as error:
            found.append(Finding("damaged", name, str(error).splitlines()[0][:200], _remedy(directory, name)))
            continue
        gone = ~np.isin(lookup.bits(named), there)
        if gone.any():
            example = named[int(np.flatnonzero(gone)[0])].as_py()
            detail = f"{int(gone.sum())} labels of images that no shard holds, {example} for one"
            remedy = "get back the shards that are missing; where their patient was deleted: smearline forget again"
            found.append(Finding("label_without_image", name, detail, remedy))
    return found


def _splits(path: Path, directory: Path, rows: pa.Table) -> list[Finding]:
    known = pq.read_table(path, columns=["sha256", "split"])
    bits, found = lookup.bits(known["sha256"]), []
    values, counts = np.unique(bits, return_counts=True)
    all_bits = lookup.bits(rows["sha256"])
    if (counts > 1).any():
        touched = rows.filter(pa.array(np.isin(all_bits, values[counts > 1])))
        detail = f"{int((counts > 1).sum())} images stand in two splits"
        found.append(Finding("in_two_splits", path.name, detail, "dvc repro --force split", _smears(touched)))
    present = ~np.isin(all_bits, lookup.bits(pa.array(dataset.deleted(directory), pa.string())))
    lacking = present & ~np.isin(all_bits, values)
    if lacking.any():
        touched = rows.filter(pa.array(lacking))
        found.append(
            Finding(
                "in_no_split",
                path.name,
                f"{len(touched)} images stand in no split",
                "dvc repro split",
                _smears(touched),
            )
        )
    return found


def _smears(rows: pa.Table | None) -> tuple[str, ...]:
    if rows is None:
        return ()
    pairs = rows.group_by(["site", "smear"]).aggregate([]).to_pylist()
    return tuple(sorted(f"{pair['site']}/{pair['smear'] or 'of no smear'}" for pair in pairs))


def _remedy(directory: Path, name: str) -> str:
    file, out = directory / name, directory / name.split("/")[0]
    return (
        f"rm {file} && dvc checkout {out}; where the file in DVC's cache is the same one and damaged too: remove it there, "
        f"then dvc fetch {out} && dvc checkout {out}"
    )


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    return digest.hexdigest()
