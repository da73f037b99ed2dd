"""The data set on disk: images in append-only Parquet shards, what experts say of them in small tables beside them.

DIR/cells/*.parquet          images as acquired (CELLS), never changed, only appended
DIR/cells/deleted/images.parquet  images whose patient was deleted (DELETED): no reader sees them, no import brings them back
DIR/cells/deleted/people.parquet  digests of these patients and of their smears (PEOPLE): nothing of theirs is taken in again
DIR/labels/cells-SITE.NUMBER.parquet  a row a label (LABELS), LABEL_PART images each; may change, is small
DIR/labels/patients-SITE.parquet  a row a patient and smear (PATIENTS)
DIR/cbc/*.parquet            blood counts, a row a value (smearline.cbc)
DIR/quarantine.parquet       what was not imported, and why (QUARANTINE)
DIR/local/files-SITE.parquet raw paths; stays on this machine, never versioned
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smearline import vocabulary
from smearline.errors import DataError

VERSIONED = ("cells", "labels", "cbc", "quarantine.parquet")
"""What of it DVC versions, all of it together."""
SHARD_BYTES = 128_000_000
LABEL_PART = 8192
"""Images whose labels stand in one table: what a day adds or a relabelling touches is written anew, and no more."""
ROW_GROUP = 64
"""Rows read together in training; at 16 kB an image a group is about a megabyte."""

CELLS = pa.schema(
    [
        ("sha256", pa.string()),  # of the file as it was found
        ("image", pa.binary()),  # its bytes, less EXIF and comments
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("microns_per_px", pa.float64()),  # null: unknown
        ("site", pa.string()),
        ("scanner", pa.string()),
        ("stain", pa.string()),
        ("patient", pa.string()),  # pseudonym, null: unknown
        ("smear", pa.string()),  # pseudonym, null: unknown
        ("acquired_at", pa.timestamp("us", tz="UTC")),
        ("origin", pa.string()),  # real | simulated
        ("source", pa.string()),
        ("thumbnail", pa.binary(256)),  # 16 x 16 luminance, for near duplicates
    ]
)
LABELS = pa.schema(
    [
        ("sha256", pa.string()),
        ("name", pa.string()),  # 'type', or a characteristic
        ("value", pa.string()),
        ("source_label", pa.string()),  # as the source said it
        ("labelled_by", pa.string()),
        ("labelled_at", pa.timestamp("us", tz="UTC")),
        ("role", pa.string()),  # reference | reannotation
        ("vocabulary", pa.string()),
        ("source", pa.string()),
        ("conflicted", pa.bool_()),
    ]
)
PATIENTS = pa.schema(
    [
        ("site", pa.string()),
        ("patient", pa.string()),
        ("smear", pa.string()),
        ("diagnosis", pa.string()),
        ("source_diagnosis", pa.string()),
        ("age", pa.float64()),
        ("sex", pa.string()),
        ("origin", pa.string()),
        ("source", pa.string()),  # the review that the diagnosis is of, null: an imported table
    ]
)
QUARANTINE = pa.schema(
    [
        ("site", pa.string()),
        ("source", pa.string()),
        ("folder", pa.string()),  # the name of the folder that was imported, or its pseudonym
        ("file", pa.string()),  # relative path, or its pseudonym where the site's identifiers are private
        ("sha256", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("size_bytes", pa.int64()),
        ("patient", pa.string()),  # pseudonym, null: unknown
        ("smear", pa.string()),  # pseudonym, null: unknown
    ]
)
OTHER_SITE, OTHER_PATIENT = ", an image of site '{}'", ", an image of another patient"
"""What a duplicate's `detail` may end in."""
LABEL_KEY = ["sha256", "name", "value", "labelled_by", "source"]
FILES = pa.schema([(name, pa.string()) for name in ("folder", "path", "sha256", "patient", "smear")])
DELETED = pa.schema(
    [
        ("sha256", pa.string()),
        ("site", pa.string()),
        ("deleted_at", pa.timestamp("us", tz="UTC")),
        ("reason", pa.string()),
    ]
)
PEOPLE = pa.schema([("person", pa.string()), ("deleted_at", pa.timestamp("us", tz="UTC")), ("reason", pa.string())])
METADATA = [name for name in CELLS.names if name not in ("image", "thumbnail")]


def write_table(table: pa.Table, path: Path, **options: Any) -> None:
    """Write beside `path` and rename, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    pq.write_table(table, unfinished, write_page_checksum=True, **options)
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


class CellWriter:
    """Appends rows to a data set as new shards, each named by what it holds. Use as a context manager."""

    def __init__(self, cells: Path, site: str, shard_bytes: int = SHARD_BYTES) -> None:
        self._cells, self._site, self._shard_bytes = cells, site, shard_bytes
        self._rows: list[Mapping[str, Any]] = []
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._flush()

    def add(self, row: Mapping[str, Any]) -> None:
        """Take a row of CELLS; a full shard is written at once."""
        self._rows.append(row)
        self._bytes += len(row["image"])
        if self._bytes >= self._shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        write_shard(self._cells, self._site, pa.Table.from_pylist(self._rows, schema=CELLS))
        self._rows, self._bytes = [], 0


def shard_name(site: str, sha256s: Sequence[str]) -> str:
    """A shard is named by the images that it holds, in their order."""
    return f"{site}-{hashlib.sha256(''.join(sha256s).encode()).hexdigest()[:16]}.parquet"


def write_shard(cells: Path, site: str, rows: pa.Table, name: str | None = None) -> Path:
    """Rows of CELLS as a shard in the folder `cells`. Returns its path."""
    path = cells / (name or shard_name(site, rows["sha256"].to_pylist()))
    write_table(
        rows,
        path,
        row_group_size=ROW_GROUP,
        compression={name: "zstd" for name in CELLS.names if name != "image"} | {"image": "none"},
        use_dictionary=[n for n in CELLS.names if n not in ("sha256", "image", "thumbnail")],
        write_statistics=[n for n in CELLS.names if n not in ("image", "thumbnail")],
    )
    return path


def cells_folder(directory: Path) -> Path:
    """The `cells` folder of a data set, which may be named itself.

    Raises:
        DataError: there is none.
    """
    for folder in (directory / "cells", directory):
        if folder.name == "cells" and folder.is_dir():
            return folder
    raise DataError(
        f"{directory} holds no 'cells' folder; import images first: smearline import SOURCE PATH --into {directory}"
    )


def shards(directory: Path) -> list[Path]:
    """The shards of a data set in their fixed order."""
    return sorted(cells_folder(directory).glob("[!.]*.parquet"))


def shard_tables(
    directory: Path, columns: Sequence[str], dictionary: Sequence[str] = ()
) -> Iterator[tuple[Path, pa.Table]]:
    """Columns of each shard (of `dictionary`, as dictionaries), several shards at a time: a row group has 64 rows, and small
    reads through a memory map take a third of the time."""

    def read(shard: Path) -> pa.Table:
        with pq.ParquetFile(shard, memory_map=True, pre_buffer=False, read_dictionary=list(dictionary)) as file:
            return file.read(columns=list(columns), use_threads=False).combine_chunks()

    found = shards(directory)
    with ThreadPoolExecutor() as pool:
        yield from zip(found, pool.map(read, found), strict=True)


def deleted(directory: Path) -> list[str]:
    """The images whose patient was deleted: they may stand in a shard until it is compacted, and are not in the data set."""
    path = deleted_path(directory, "images")
    return sorted(set(pq.read_table(path, columns=["sha256"])["sha256"].to_pylist())) if path.exists() else []


def deleted_path(directory: Path, what: Literal["images", "people"]) -> Path:
    """The table of DELETED or of PEOPLE; it lies among the shards so that it is one version with them."""
    return (directory if directory.name == "cells" else directory / "cells") / "deleted" / f"{what}.parquet"


def person(site: str, kind: str, pseudonym: str) -> str:
    """What PEOPLE holds of a patient, or of a smear of his (kind 'patient' or 'smear')."""
    return hashlib.sha256(f"{site}/{kind}/{pseudonym}".encode()).hexdigest()


class Forgotten:
    """Whose data must not be taken in: the patients who were deleted, their smears, and their images."""

    def __init__(self, directory: Path) -> None:
        path = deleted_path(directory, "people")
        self.people = set(pq.read_table(path, columns=["person"])["person"].to_pylist()) if path.exists() else set()
        self.images = set(deleted(directory))

    def has(self, site: str, patient: str | None, smear: str | None) -> bool:
        """Whether what names this patient, or else this smear alone, is theirs: another patient's smear of the same number is
        not."""
        return bool(self.people) and self.who(site, patient, smear) in self.people

    @staticmethod
    def who(site: str, patient: str | None, smear: str | None) -> str | None:
        """The person of PEOPLE whom this would be."""
        kind, name = ("patient", patient) if patient else ("smear", smear)
        return person(site, kind, name) if name else None


def without(rows: pa.Table, sha256s: Sequence[str] | pa.ChunkedArray) -> pa.Table:
    """The rows (a table or a batch) but for those of these images."""
    gone = sha256s if isinstance(sha256s, pa.ChunkedArray) else pa.array(sha256s, pa.string())
    return rows.filter(pc.invert(pc.is_in(rows["sha256"], gone))) if len(gone) else rows


def refuse_empty(directory: Path, parts: Sequence[Any]) -> None:
    if not parts:
        raise DataError(f"{directory} holds no image yet")


def index(directory: Path, columns: Sequence[str] = METADATA) -> pd.DataFrame:
    """Everything but the pictures, a row an image, with `shard` (its path) and `row` (its place in it).

    Raises:
        DataError: the data set holds no image, or an image twice.
    """
    parts, gone = [], set(deleted(directory))
    for shard, table in shard_tables(directory, sorted({*columns, "sha256"}) if gone else columns):
        part = table.to_pandas()
        part = part.assign(shard=str(shard.resolve()), row=range(len(part)))
        parts.append(part[~part["sha256"].isin(gone)][[*columns, "shard", "row"]] if gone else part)
    refuse_empty(directory, parts)
    frame = pd.concat(parts, ignore_index=True)
    if "sha256" in frame and frame["sha256"].duplicated().any():
        raise DataError(f"{directory}: {int(frame['sha256'].duplicated().sum())} images stand in it twice")
    return frame


def iter_rows(
    directory: Path, columns: Sequence[str], batch: int = 256, only: Sequence[Path] | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Rows in their stored order (of the shards `only`), as dictionaries of lists; memory stays that of one batch."""
    gone = deleted(directory)
    for shard in shards(directory) if only is None else only:
        for part in pq.ParquetFile(shard).iter_batches(batch_size=batch, columns=list({*columns, "sha256"})):
            if len(here := without(part, gone)):
                yield here.select(list(columns)).to_pydict()


def patients(cells: pd.DataFrame) -> pd.Series:
    """The patient of each image (site, smear, patient); where none is given, that of another image of its smear."""
    return cells["patient"].fillna(cells.groupby(["site", "smear"])["patient"].transform("first"))


def smear_patients(directory: Path) -> dict[tuple[str, str], str]:
    """(site, smear) to the patient whom an image of it, or else a row of PATIENTS, names first."""
    if not (directory / "cells").is_dir():
        return {}
    whose, gone = ["site", "smear", "patient"], deleted(directory)
    rows = read_tables(directory, "labels/patients-*.parquet", PATIENTS)
    tables = [without(table, gone) for _, table in shard_tables(directory, [*whose, *(["sha256"] if gone else [])])]
    tables.append(pa.Table.from_pandas(rows[whose], preserve_index=False))
    found: dict[tuple[str, str], str] = {}
    for table in tables:
        for row in table.group_by(whose, use_threads=False).aggregate([]).to_pylist():
            if row["smear"] and row["patient"]:
                found.setdefault((row["site"], row["smear"]), row["patient"])
    return found


def whose(cells: pd.DataFrame) -> pd.Series:
    """What is not independent of each image (sha256, site, smear, patient) has the same name: that of its patient, of its smear
    where no patient is known, of itself where neither is."""
    names = "cell/" + cells["sha256"]
    for kind, of in (("smear", cells["smear"]), ("patient", patients(cells))):
        names = (cells["site"] + f"/{kind}/" + of.fillna("")).where(of.notna(), names)
    return names


def diagnoses(directory: Path) -> pd.DataFrame:
    """site, patient, diagnosis: a row each patient whose diagnosis is known and not disputed."""
    known = read_tables(directory, "labels/patients-*.parquet", PATIENTS).dropna(subset=["diagnosis", "patient"])
    disputed = known.groupby(["site", "patient"])["diagnosis"].transform("nunique") > 1
    return known.loc[~disputed, ["site", "patient", "diagnosis"]].drop_duplicates(["site", "patient"])


def trained_on(cells: pd.DataFrame, seen: pd.DataFrame) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which cells (sha256, site, smear, patient), or others of their patient (`patients`) or smear, stand among `seen` (a model's
    trained_on.parquet; older ones do not know the smear)."""
    found = cells["sha256"].isin(seen["sha256"]).to_numpy(bool, copy=True)
    cells = cells.assign(patient=patients(cells))
    seen = seen.assign(patient=patients(seen)) if {"patient", "smear"} <= set(seen) else seen
    for kind in {"patient", "smear"} & set(seen):
        known = pd.MultiIndex.from_frame(seen.loc[seen[kind].notna(), ["site", kind]])
        found |= pd.MultiIndex.from_frame(cells[["site", kind]]).isin(known)
    return np.asarray(found)


def digest(frame: pd.DataFrame) -> str:
    """The version of a set of images: SHA-256 over their sorted sha256 values."""
    return hashlib.sha256("\n".join(sorted(frame["sha256"])).encode()).hexdigest()


def read_tables(directory: Path, pattern: str, schema: pa.Schema) -> pd.DataFrame:
    """All tables of a kind as one frame, empty where there are none."""
    found = sorted(directory.glob(pattern))
    tables = [pq.read_table(path, schema=schema) for path in found] or [schema.empty_table()]
    return pa.concat_tables(tables).to_pandas()


def merge_rows(
    path: Path,
    rows: Iterable[Mapping[str, Any]],
    schema: pa.Schema,
    key: Sequence[str],
    keep: Literal["first", "last"] = "first",
    drop: Callable[[Any], bool] | None = None,
) -> pd.DataFrame:
    """Add rows to a small table, without the old ones that `drop` picks (by attribute); of rows with the same key the
    first (or the last) stays. Returns the whole table."""
    was = pq.read_table(path, schema=schema) if path.exists() else schema.empty_table()
    frame = _merged(was, pa.Table.from_pylist(list(rows), schema=schema), key, keep, drop)
    if keep == "last":
        frame = frame.sort_values(list(key), ignore_index=True)
    if not path.exists() or not frame.equals(was.to_pandas()):
        write_table(pa.Table.from_pandas(frame, schema=schema, preserve_index=False), path, compression="zstd")
    return frame


def _merged(
    old: pa.Table, new: pa.Table, key: Sequence[str], keep: Literal["first", "last"], drop: Callable[[Any], bool] | None
) -> pd.DataFrame:
    if drop is not None and len(old):
        old = old.filter([not drop(row) for row in old.to_pandas().itertuples()])
    return pa.concat_tables([old, new]).to_pandas().drop_duplicates(list(key), keep=keep).reset_index(drop=True)


def merge_labels(
    directory: Path,
    site: str,
    rows: pa.Table,
    drop: Callable[[Any], bool] | None = None,
    also: Iterable[str] = (),
) -> int:
    """Add rows of LABELS to a site's tables, without those that `drop` picks among the old rows of the same images, and of the
    images `also`. An image's labels stay in the table that holds them, new images fill the last one; no other table is written, so
    that the work, and what DVC moves, hang on what comes and not on what is there.

    Returns:
        How many labels of before are gone.
    """
    went, last, room = 0, 0, 0
    images = pc.unique(pa.concat_arrays([pa.array(also, pa.string()), *rows["sha256"].chunks]))
    for path in label_paths(directory, site):
        named = pq.read_table(path, columns=["sha256"])["sha256"]
        if pc.any(pc.is_in(named, images)).as_py():
            touched = pc.is_in(rows["sha256"], named)
            went += _merge_part(path, rows.filter(touched), images, drop)
            rows = rows.filter(pc.invert(touched))
        if (number := path.name.split(".")[1]).isdigit():
            last, room = int(number), LABEL_PART - pc.count_distinct(named).as_py()
    image = rows["sha256"].combine_chunks().dictionary_encode().indices.to_numpy() - max(room, 0)
    part_N = np.where(image < 0, last, last + 1 + image // LABEL_PART)
    for part in np.unique(part_N):
        path = directory / "labels" / f"cells-{site}.{part:05d}.parquet"
        _merge_part(path, rows.filter(pa.array(part_N == part)), images, None)
    return went


def _merge_part(path: Path, rows: pa.Table, images: pa.Array, drop: Callable[[Any], bool] | None) -> int:
    old = pq.read_table(path, schema=LABELS) if path.exists() else LABELS.empty_table()
    same = pc.is_in(old["sha256"], images)
    was = old.filter(same)
    frame = _merged(was, rows, LABEL_KEY, "first", drop)
    frame["conflicted"] = conflicted(frame)
    now = pa.Table.from_pandas(frame, schema=LABELS, preserve_index=False)
    if not now.equals(was):
        write_table(pa.concat_tables([old.filter(pc.invert(same)), now]), path, compression="zstd")
    return sum(drop(row) for row in was.to_pandas().itertuples()) if drop else 0


def label_paths(directory: Path, site: str = "*") -> list[Path]:
    """A site's tables of labels, the one that is filled last; or every site's."""
    return sorted(directory.glob(f"labels/cells-{site}.*parquet"))


def read_labels(directory: Path) -> pd.DataFrame:
    """All labels, long form (LABELS); an image may be labelled at two sites, so `conflicted` is worked out over all."""
    labels = read_tables(cells_folder(directory).parent, "labels/cells-*.parquet", LABELS)
    return labels.assign(conflicted=conflicted(labels))


def finest(reference: pd.DataFrame) -> pd.DataFrame:
    """Reference labels, but for a parent's where the same image has one of its children's, which says more."""
    for parent, children in vocabulary.load().parents.items():
        finer = reference["sha256"][reference["value"].isin(children)]
        reference = reference[(reference["value"] != parent) | ~reference["sha256"].isin(finer)]
    return reference


def conflicted(labels: pd.DataFrame) -> pd.Series:
    """True for each label of an image and name whose reference labels contradict each other.

    A parent does not contradict its child: 'neutrophil' and 'band neutrophil' agree.
    """
    of = ["sha256", "name"]
    distinct = finest(labels[labels["role"] == "reference"]).drop_duplicates([*of, "value"])
    clashing = pd.MultiIndex.from_frame(distinct.loc[distinct.duplicated(of), of])
    return pd.Series(pd.MultiIndex.from_frame(labels[of]).isin(clashing), labels.index)


def resolved_labels(directory: Path) -> pd.DataFrame:
    """One row an image: sha256, `true_type` (a type or a parent; None where unlabelled or conflicted), `conflicted`,
    and a column for each characteristic (None where it has no undisputed label). Re-annotations do not enter.
    """
    words = vocabulary.load()
    labels = read_labels(directory)
    reference = labels[labels["role"] == "reference"]
    usable = finest(reference[~reference["conflicted"]]).drop_duplicates(["sha256", "name"])
    wide = usable.pivot(index="sha256", columns="name", values="value")
    wide = wide.reindex(columns=["type", *words.characteristics]).rename(columns={"type": "true_type"})
    disputed = reference.loc[reference["conflicted"] & (reference["name"] == "type"), "sha256"].unique()
    wide = wide.reindex(wide.index.union(pd.Index(disputed), sort=True))
    wide["conflicted"] = wide.index.isin(disputed)
    wide = wide.rename_axis(index="sha256", columns=None).reset_index().astype(object)
    return wide.where(wide.notna(), None)


def labelled_index(directory: Path) -> pd.DataFrame:
    """`index` joined with `resolved_labels`; images without any label have None."""
    frame = index(directory).merge(resolved_labels(directory), on="sha256", how="left", validate="one_to_one")
    frame["conflicted"] = frame["conflicted"].eq(True)
    return frame.astype({c: object for c in frame.columns if c in vocabulary.load().characteristics})
