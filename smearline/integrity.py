"""Is a data set whole? Every byte of every file, every label's image, every split; and what to do where not."""

import hashlib
import shlex
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smearline import dataset, images, lookup
from smearline.errors import ImageError

_UNREADABLE = (OSError, EOFError, pa.ArrowException, ValueError, TypeError, KeyError)
"""What a damaged Parquet file raises: a flipped byte may stand in a name or a length."""
_TABLES = ("labels/*.parquet", "cbc/*.parquet", "cells/deleted/*.parquet", "quarantine.parquet")


@dataclass(frozen=True)
class Finding:
    """What is wrong, and how it is got back."""

    kind: str
    """damaged, missing, unversioned, behind, twice, label_without_image, label_of_deleted, in_two_splits, in_no_split or
    undecodable."""
    where: str
    detail: str
    remedy: str
    smears: tuple[str, ...] = field(default=())
    """site/smear of what is touched, where it can still be told."""


@dataclass(frozen=True)
class Version:
    """What a version says of the files of a data set."""

    md5: Mapping[str, str]
    """Of each file, relative to the data set; empty: there is no version."""
    copies: Mapping[str, Path] = field(default_factory=dict)
    """Where DVC's cache has, or would have, each file."""
    behind: bool = False
    """Whether the data here are still those of another version: the pointers came by git, and no `dvc checkout` followed."""

    def good_copy(self, name: str) -> Path | None:
        """The cache's copy, where it is what the version says."""
        path = self.copies.get(name)
        return path if path and path.is_file() and _md5(path) == self.md5.get(name) else None

    def remedy(self, directory: Path, name: str) -> str:
        file, folder = (shlex.quote(str(path)) for path in (directory / name, (directory / name).parent))
        if name.startswith("cells/deleted/") and (name not in self.md5 or self.good_copy(name) is None):
            return "get it back from a backup or an older version (git log), then forget again who was forgotten since"
        if name not in self.md5:
            if name.startswith("cells/"):
                return f"rm {file}, and import its images again from their files: no version has it"
            return "no version has it: get it back from a backup, or from an older version (dvc checkout of an older commit)"
        put = f"mkdir -p {folder} && cp {{0}} {file}.new && mv -f {file}.new {file}"
        if good := self.good_copy(name):
            done = put.format(shlex.quote(str(good)))
            if name.startswith("cells/deleted/"):
                done += "  # then forget again who was forgotten since that version"
            return done
        out, copy = shlex.quote(f"{directory / name.split('/')[0]}.dvc"), shlex.quote(str(self.copies.get(name, "")))
        got = f"mv -f {copy} {copy}.damaged; dvc fetch {out} && test -f {copy}"
        return f"{got} && {put.format(copy)}  # the cache's copy is bad, too"


def verify(
    directory: Path,
    version: Version | None = None,
    *,
    splits: Path | None = None,
    decode: bool = False,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> list[Finding]:
    """Everything that is wrong with a data set; nothing where it is whole.

    Args:
        version: without one, a flipped byte is found by the files' own page checksums, which do not cover headers and footers.
        splits: splits.parquet of the stage `split`.
        decode: decode every image too.
    """
    version, found, parts = version or Version({}), list[Finding](), [_ROWS.empty_table()]
    shards = sorted((directory / "cells").glob("[!.]*.parquet"))
    with ThreadPoolExecutor() as pool:
        done = pool.map(lambda shard: _shard(shard, directory, version, decode), shards)
        for number, (problem, rows) in enumerate(done, 1):
            progress(number, len(shards))
            found += [problem] if problem else []
            parts += [rows] if rows is not None else []
    whole = pa.concat_tables(parts)
    there = {path.relative_to(directory).as_posix() for path in shards}
    tables = {path.relative_to(directory).as_posix() for pattern in _TABLES for path in directory.glob(pattern)}
    found += [problem for name in sorted(tables) if (problem := _table(directory, name, version))]
    found += [_missing(directory, name, version, whole) for name in sorted(version.md5.keys() - there - tables)]
    found += _twice(whole) + _labels(directory, whole) + (_splits(splits, directory, whole) if splits else [])
    if version.behind:
        found = [one for one in found if one.kind not in ("unversioned", "missing")]
        what = "the pointers are of another version than the data, and were not made from them (git pull?)"
        found.insert(
            0, Finding("behind", directory.name, what, "dvc checkout, or dvc pull where the version is not here")
        )
    return [_with_lost_smears(one, directory, whole) for one in found]


_ROWS = pa.schema([("sha256", pa.string()), ("site", pa.string()), ("smear", pa.string())])


def _rows(path: Path) -> pa.Table:
    """sha256, site, smear of a shard. Raises one of _UNREADABLE."""
    with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
        rows = file.read(columns=_ROWS.names, use_threads=False).cast(_ROWS).combine_chunks()
    rows.validate(full=True)
    if len(rows) and pc.any(pc.not_equal(pc.binary_length(rows["sha256"]), 64)).as_py():
        raise ValueError("a sha256 is none")
    return rows


def _shard(path: Path, directory: Path, version: Version, decode: bool) -> tuple[Finding | None, pa.Table | None]:
    """What is wrong with a shard, and its rows where they can be trusted."""
    name, rows = path.relative_to(directory).as_posix(), None
    wrong = ""
    try:
        rows = _rows(path)
        if path.name != dataset.shard_name(path.stem.rsplit("-", 1)[0], rows["sha256"].to_pylist()):
            wrong = "it does not hold what its name says"
        elif name in version.md5 and _md5(path) != version.md5[name]:
            wrong = "its bytes are not those of the version"
        elif name not in version.md5:
            _read_all(path)
    except _UNREADABLE as error:
        wrong = _first_line(error)
    if wrong:
        return Finding("damaged", name, wrong, version.remedy(directory, name), _smears(rows)), rows
    if decode and (problem := _undecodable(path, name, version.remedy(directory, name), rows)):
        return problem, rows
    if version.md5 and name not in version.md5:
        remedy = f"it was imported since: {_add(directory)}"
        return Finding("unversioned", name, "no version has it", remedy, _smears(rows)), rows
    return None, rows


def _read_all(path: Path) -> None:
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for _ in file.iter_batches(batch_size=4096):
            pass


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _undecodable(path: Path, name: str, remedy: str, rows: pa.Table) -> Finding | None:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=256, columns=["sha256", "image"]):
        for sha256, data in zip(batch["sha256"].to_pylist(), batch["image"].to_pylist(), strict=True):
            try:
                images.decode(data)
            except ImageError as error:
                mine = rows.filter(pc.equal(rows["sha256"], sha256))
                detail = f"image {sha256} cannot be decoded: {error}"
                return Finding("undecodable", name, detail, remedy, _smears(mine))
    return None


def _table(directory: Path, name: str, version: Version) -> Finding | None:
    """What is wrong with a table: labels, patients, blood counts, quarantine, what was deleted."""
    path = directory / name
    try:
        _read_all(path)
    except _UNREADABLE as error:
        return Finding("damaged", name, _first_line(error), version.remedy(directory, name))
    if not version.md5 or _md5(path) == version.md5.get(name):
        return None
    # Tables may change: it reads well, and only who changed it knows whether that was meant.
    remedy = _add(directory)
    if name in version.md5:
        remedy += f"; where nobody labelled, imported or deleted anything since the version: {version.remedy(directory, name)}"
    return Finding("unversioned", name, "it has changed since the version, and reads well", remedy)


def _add(directory: Path) -> str:
    """What makes a version of all that is here: a part of a deletion is none."""
    there = [shlex.quote(str(directory / name)) for name in dataset.VERSIONED if (directory / name).exists()]
    return f"dvc add {' '.join(there)} and git commit (python -m flows ingest does both)"


def _missing(directory: Path, name: str, version: Version, whole: pa.Table) -> Finding:
    """What the version has and the folder does not: lost, or a shard that was compacted."""
    rows = None
    if name.startswith("cells/") and "/deleted/" not in name and (copy := version.good_copy(name)):
        rows = dataset.without(dataset.without(_rows(copy), whole["sha256"]), _deleted(directory))
        if not len(rows):
            remedy = f"it was compacted since: {_add(directory)}"
            return Finding("unversioned", name, "its images stand in another shard, or were deleted", remedy)
    return Finding(
        "missing", name, "the version has it, the folder does not", version.remedy(directory, name), _smears(rows)
    )


def _twice(rows: pa.Table) -> list[Finding]:
    bits = lookup.bits(rows["sha256"])
    _, first, counts = np.unique(bits, return_index=True, return_counts=True)
    if not (counts > 1).any():
        return []
    touched = rows.take(first[counts > 1])
    remedy = "remove the shard that came last (git log data/cells.dvc says which), and import again what only it holds"
    return [Finding("twice", "cells", f"{len(touched)} images stand in two shards", remedy, _smears(touched))]


def _labels(directory: Path, rows: pa.Table) -> list[Finding]:
    found = []
    gone = lookup.bits(pa.array(_deleted(directory), pa.string()))
    forgotten, known = (pd.Index(np.unique(b)) for b in (gone, np.concatenate([lookup.bits(rows["sha256"]), gone])))
    for path in dataset.label_paths(directory):
        name = path.relative_to(directory).as_posix()
        try:
            named = pq.read_table(path, columns=["sha256"])["sha256"]
            bits = lookup.bits(named)
            of_deleted = forgotten.get_indexer(bits) >= 0
        except _UNREADABLE:
            continue  # it is found as a damaged table
        for kind, of, whose, remedy in (
            ("label_without_image", known.get_indexer(bits) < 0, "images that no shard here holds", _GET_BACK),
            ("label_of_deleted", of_deleted, "images of patients who were deleted", "smearline compact"),
        ):
            if of.any():
                example = named[int(np.flatnonzero(of)[0])].as_py()
                found.append(Finding(kind, name, f"{int(of.sum())} labels of {whose}, {example} for one", remedy))
    return found


_GET_BACK = "get back the shards that are damaged or missing (above); where there are none, import these images again"


def _deleted(directory: Path) -> list[str]:
    try:
        return dataset.deleted(directory)
    except _UNREADABLE:
        return []  # it is found as a damaged table


def _splits(path: Path, directory: Path, rows: pa.Table) -> list[Finding]:
    try:
        known = pq.read_table(path, columns=["sha256", "split"])
        bits = lookup.bits(known["sha256"])
    except _UNREADABLE as error:
        return [Finding("damaged", path.name, _first_line(error), "dvc repro --force split")]
    found = []
    values, counts = np.unique(bits, return_counts=True)
    all_bits = lookup.bits(rows["sha256"])
    present = ~np.isin(all_bits, lookup.bits(pa.array(_deleted(directory), pa.string())))
    for kind, of, what, remedy in (
        ("in_two_splits", np.isin(all_bits, values[counts > 1]), "two splits", "dvc repro --force split"),
        ("in_no_split", present & ~np.isin(all_bits, values), "no split", "dvc repro split"),
    ):
        if of.any():
            touched = rows.filter(pa.array(of))
            found.append(Finding(kind, path.name, f"{len(touched)} images stand in {what}", remedy, _smears(touched)))
    return found


def _smears(rows: pa.Table | None) -> tuple[str, ...]:
    if rows is None:
        return ()
    return _named((pair["site"], pair["smear"]) for pair in rows.group_by(["site", "smear"]).aggregate([]).to_pylist())


def _named(pairs: Iterable[tuple[str, str | None]]) -> tuple[str, ...]:
    return tuple(sorted(f"{site}/{smear or 'of no smear'}" for site, smear in pairs))


def _with_lost_smears(finding: Finding, directory: Path, whole: pa.Table) -> Finding:
    """Of a shard that cannot be read: the site's smears with images that this machine imported and no shard here holds."""
    if finding.smears or finding.kind not in ("damaged", "missing") or not finding.where.startswith("cells/"):
        return finding
    site = Path(finding.where).stem.rsplit("-", 1)[0]
    path = directory / "local" / f"files-{site}.parquet"
    if not path.exists():
        return finding
    files = pq.read_table(path, schema=dataset.FILES)
    lost = dataset.without(files, whole["sha256"])["smear"]
    return replace(finding, smears=_named({(site, smear) for smear in lost.to_pylist()}))


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
