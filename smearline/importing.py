"""Import: every file found under a folder ends up in the data set, or in quarantine with its reason.

The folder is read in sorted order, so that the same files make the same shards. A run that was killed is simply
run again: whole shards are known, half ones were never renamed into place.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from smearline import cbc, dataset, images, labelling, lookup, pseudonyms
from smearline.errors import ImageError, ImportSourceError, SiteError
from smearline.import_folders import listing, only_one
from smearline.sites import LEAST, MOST, Site
from smearline.source_tables import Described, SourceTables
from smearline.sources import Source, at_end

Json = dict[str, Any]
Progress = Callable[[int, int], None]
_FILE = ("path", "sha256", "patient", "smear")
_BLOCK = 2048
"""Files that are read, hashed and decoded together."""


@dataclass
class ImportReport:
    """What became of the files. `found` is the sum of the imported, the already there, the tables and the quarantined."""

    found: int = 0
    imported: int = 0
    already_there: int = 0
    tables: int = 0
    quarantined: Counter[str] = field(default_factory=Counter)
    unlabelled: int = 0
    labels: int = 0
    conflicted: int = 0
    rows_without_image: int = 0
    count_values: int = 0
    corrected_counts: int = 0
    counts_of_another: int = 0
    samples_without_image: int = 0
    relabelled: int = 0
    other_identity: int = 0
    other_scale: int = 0
    unread_ages: int = 0
    reviewed_otherwise: int = 0
    ignored_columns: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = {
            f"{self.found} files found = {self.imported} imported + {self.already_there} there already"
            f" + {self.tables} tables read + {self.quarantined.total()} quarantined": True,
            f"quarantined: {', '.join(f'{n} {r}' for r, n in self.quarantined.most_common()) or 'none'}": True,
            f"labels: {self.labels} in all; {self.conflicted} images conflicted (left out of training and scoring), "
            f"{self.unlabelled} images of this run unlabelled": True,
            f"table rows without an image here: {self.rows_without_image}": self.rows_without_image,
            f"labels corrected: {self.relabelled}": self.relabelled,
            f"patients whose age is no number of years, and is left out: {self.unread_ages}": self.unread_ages,
            f"diagnoses that a reviewer signed off otherwise, whose word stands: {self.reviewed_otherwise}": (
                self.reviewed_otherwise
            ),
            f"columns that mean nothing here: {', '.join(self.ignored_columns)}": self.ignored_columns,
            f"blood counts: {self.count_values} values": self.count_values,
            f"blood counts corrected: {self.corrected_counts} values": self.corrected_counts,
            f"blood counts of a smear that is another patient's, not taken: {self.counts_of_another} values": (
                self.counts_of_another
            ),
            f"samples without an image here: {self.samples_without_image}": self.samples_without_image,
        }
        return "\n".join(line for line, said in lines.items() if said)


def import_source(
    source: Source,
    root: Path,
    site: Site,
    into: Path,
    *,
    microns_per_px: float | None = None,
    progress: Progress = lambda *_: None,
) -> ImportReport:
    """Import the folder `root`, laid out as `source`, as images of `site` into the data set `into`.

    Args:
        microns_per_px: the scale of these images where the user knows it; must agree with the site's file.
        progress: called with (files done, files in all).

    Raises:
        ImportSourceError: the folder has nothing of this layout, a required table is missing, or a class is unmapped.
        VocabularyError: a class, characteristic or diagnosis is not in the vocabulary.
        SiteError: the scale contradicts the site's file.
        In each of these cases nothing was imported.
    """
    if not root.is_dir():
        raise ImportSourceError(f"{root} is no folder")
    if into.exists() and not into.is_dir():
        raise ImportSourceError(f"--into {into} is no folder")
    if into.name == "cells":
        raise ImportSourceError(f"--into names the data set, whose images lie in 'cells': --into {into.parent}")
    if into.resolve().is_relative_to(root.resolve()):
        raise ImportSourceError(f"--into {into} lies inside the folder that is imported; choose a place outside {root}")
    scale = site.microns_per_px
    for whose, said in ((f"source '{source.name}'", source.microns_per_px), ("--microns-per-px", microns_per_px)):
        if said is not None and scale is not None and not _agree(said, scale):
            raise SiteError(
                f"{whose} says {said} um/px, sites/{site.name}.yaml says {scale}. "
                "Correct the site's file, or import under the site that these images come from."
            )
        if said is not None and not LEAST < said < MOST:
            raise SiteError(f"{whose} says {said} um/px, which is no scale of a microscope's picture")
        scale = said if scale is None else scale
    paths, unreadable = listing(root)
    run = _Import(source, site, into, SourceTables(source, root, paths), scale)
    report = run.report
    report.found, report.tables = len(paths) + len(unreadable), len(run.tables.files)
    for path in unreadable:
        run.reject(path, "unreadable", "the folder cannot be listed")
    if source.images == "imported":
        run.labels_of_imported(paths)
    else:
        run.images(root, paths, progress)
    placed = report.imported + report.already_there + report.tables + report.quarantined.total()
    assert placed == report.found, f"{report.found} files found, {placed} accounted for"
    if report.other_scale:
        raise ImportSourceError(
            f"{report}\n{report.other_scale} images were imported before with another scale than {scale} um/px, which is said now. "
            "A shard never changes, so they are still read with theirs; the rest was imported. Where the new scale is right: "
            "import all into a new folder."
        )
    if report.other_identity:
        raise ImportSourceError(
            f"{report}\n{report.other_identity} images were imported before with another patient or smear than is "
            "said now. A shard never changes, so theirs stay as they were, and nothing was taken of what is said of them now; the "
            "other images were imported. Where the new names are right: import all into a new folder."
        )
    return report


def _agree(one: float, other: float) -> bool:
    return abs(one / other - 1) <= 0.01


def _printable(path: str) -> str:
    """A path of any bytes as text that can be stored."""
    return path.encode("utf-8", "backslashreplace").decode()


class _Import:
    """One run: what was found, and what of it goes where."""

    def __init__(self, source: Source, site: Site, into: Path, tables: SourceTables, scale: float | None) -> None:
        self.source, self.site, self.into, self.tables, self.scale = source, site, into, tables, scale
        self.report = ImportReport(ignored_columns=tables.ignored_columns)
        self.key = pseudonyms.key(site)
        self.files_path = into / "local" / f"files-{site.name}.parquet"
        self.pattern = at_end(source.pattern)
        where = tables.root.resolve()  # two folders may have one name
        self.folder = (
            f"{where.name if site.identifiers == 'public' else ''}#{hashlib.sha256(bytes(where)).hexdigest()[:8]}"
        )
        self.forgotten = dataset.Forgotten(into)
        self.whose_smear: dict[tuple[str, str], str] = {}
        self.quarantine: list[Json] = []
        self.labels: list[pa.Table] = []

    def files(self) -> pa.Table:
        """The raw paths of the site's images, but for the deleted."""
        if not self.files_path.exists():
            return dataset.FILES.empty_table()
        return dataset.without(pq.read_table(self.files_path, schema=dataset.FILES), dataset.deleted(self.into))

    def describe(self, path: str) -> Described:
        match = self.pattern.search(path)
        assert match is not None, "only what fits is described"
        return self.tables.describe(path, match.groupdict(""))

    def images(self, root: Path, paths: list[str], progress: Progress) -> None:
        """Import every image among `paths`; all that can be refused is refused before anything is written."""
        found = self.sort(paths)
        if not found:
            raise ImportSourceError(
                f"no image under {root} fits the layout of '{self.source.name}' ({len(paths)} files found); "
                f"it expects .../{self.source.pattern}"
            )
        for path in found:
            self.describe(path)
        rows = [row for path in self.tables.count_files for row in cbc.read_counts(path, self.site, self.key)]
        cbc.refuse_contradictions(pd.DataFrame(rows, columns=cbc.COUNTS.names), cbc.KEY, "the exports in this folder")
        with only_one(self.into):
            self.forgotten = dataset.Forgotten(self.into)
            counts = [row for row in rows if not self.forgotten.has(self.site.name, row["patient"], row["smear"])]
            corrected = self.write(root, found, progress)
            self.counts([row for row in counts if not self.of_another(row["smear"], row["patient"])], counts)
            self.report.rows_without_image = self.tables.unused_rows()
            self.store(corrected, paths)

    def of_another(self, smear: str | None, patient: str | None) -> bool:
        """Whether the first that names a patient of this smear names another."""
        if not smear or not patient:
            return False
        return self.whose_smear.setdefault((self.site.name, smear), patient) != patient

    def counts(self, rows: list[Json], said: list[Json]) -> None:
        """Blood counts into the data set; what was said otherwise before is corrected. `said`: with those of other patients."""
        path = self.into / "cbc" / f"{self.site.name}.parquet"
        old = (pq.read_table(path, schema=cbc.COUNTS) if path.exists() else cbc.COUNTS.empty_table()).to_pandas()
        now = dataset.merge_rows(path, rows, cbc.COUNTS, cbc.KEY, keep="last")
        self.report.count_values = int(now["value"].notna().sum())
        self.report.corrected_counts = len(pd.concat([now, old]).drop_duplicates()) - len(now)
        self.report.counts_of_another = len(said) - len(rows)
        if rows:
            there = set(pc.unique(self.files()["smear"]).to_pylist())
            self.report.samples_without_image = len({row["smear"] for row in rows} - there)

    def write(self, root: Path, paths: list[str], progress: Progress) -> set[str]:
        """New images into new shards, a block of files at a time. Returns the images whose file was imported before: their
        labels are said anew."""
        known, files_before, gone = lookup.Known(self.into), self.files(), set(dataset.deleted(self.into))
        listed = pc.is_in(files_before["path"], pa.array(map(_printable, paths), pa.string()))
        ours = pc.fill_null(pc.equal(files_before["folder"], self.folder), False)
        owners: dict[str, str] = {}  # the first file with these bytes
        patient_of: dict[str, str | None] = {}  # of what is new
        before: set[tuple[str | None, ...]] = set()
        for seen in zip(*files_before.filter(listed).select(_FILE).to_pydict().values(), strict=True):
            owners.setdefault(seen[1], seen[0])
            before.add(seen)
        files: list[tuple[str | None, ...]] = []
        spoken_of: set[str] = set()
        table = self.into / "labels" / f"patients-{self.site.name}.parquet"
        told = pq.read_table(table).to_pylist() if table.exists() else []
        old = {(row["patient"], row["smear"]): row for row in told}
        self.whose_smear = dataset.smear_patients(self.into)
        patients: dict[tuple[str | None, str | None], Json] = {}
        ageless: set[str] = set()
        with dataset.CellWriter(self.into / "cells", self.site.name) as writer, ThreadPoolExecutor() as pool:
            for start in range(0, len(paths), _BLOCK):
                block = [self.describe(path) for path in paths[start : start + _BLOCK]]
                read = list(pool.map(lambda item: _read(root / item.path), block))
                there = known.find(
                    [sha256 for sha256, _ in read if sha256], ["site", "patient", "smear", "microns_per_px"]
                )
                new = [
                    (data, item) if sha256 and sha256 not in there else None
                    for (sha256, data), item in zip(read, block, strict=True)
                ]
                cells = pool.map(lambda job: job and self.cell(*job), new)
                labels: list[Json] = []
                for item, (sha256, data), cell in zip(block, read, cells, strict=True):
                    path, owner = _printable(item.path), self.owner(item)
                    whose = {"patient": owner["patient"], "smear": owner["smear"]}
                    if not sha256 and not self.forgotten.has(self.site.name, **whose):
                        self.reject(item.path, "unreadable", data.decode(), **whose)
                        continue
                    site, *identity, stored = there.get(sha256, (self.site.name, None, None, None))
                    of = {"sha256": sha256 or None, "size_bytes": len(data)}
                    if sha256 in gone or self.forgotten.has(self.site.name, **whose):
                        why = "an image of a patient who was deleted; it is not taken again"
                        self.reject(item.path, "deleted", why, **of, file=self.pseudonym("file", path))
                        continue
                    of |= whose
                    if isinstance(cell, ImageError):
                        self.reject(item.path, cell.reason, cell.detail, **of)
                        continue
                    if owners.setdefault(sha256, path) != path or site != self.site.name:
                        where = dataset.OTHER_SITE.format(site) if site != self.site.name else ""
                        other = {patient_of.get(sha256, identity[0]), owner["patient"]} - {None}
                        where += dataset.OTHER_PATIENT if site == self.site.name and len(other) > 1 else ""
                        self.reject(item.path, "duplicate", f"duplicate of {sha256}{where}", **of)
                    elif self.of_another(owner["smear"], owner["patient"]) and cell:
                        why = "the smear's number is that of another patient's: give each smear a number of its own"
                        self.reject(item.path, "smear_of_another_patient", why, **of)
                        continue
                    elif cell is None:
                        self.report.already_there += 1
                        self.report.other_scale += bool(self.scale and stored and not _agree(stored, self.scale))
                        if identity != [*whose.values()] and (path, sha256, *whose.values()) not in before:
                            self.report.other_identity += 1
                            continue
                    else:
                        writer.add(owner | cell | {"sha256": sha256})
                        patient_of[sha256] = owner["patient"]
                        self.report.imported += 1
                    files.append((path, sha256, *whose.values()))
                    spoken_of |= {sha256} if item.spoken_of else set()
                    self.report.unlabelled += not any(label["name"] == "type" for label in item.labels)
                    labels += [{**label, "sha256": sha256} for label in item.labels]
                    if owner["patient"]:
                        patients[owner["patient"], owner["smear"]] = owner | _patient(item)
                        if item.fields.get("age") and patients[owner["patient"], owner["smear"]]["age"] is None:
                            ageless.add(owner["patient"])
                self.labels.append(pa.Table.from_pylist(labels, schema=dataset.LABELS))
                progress(min(start + _BLOCK, len(paths)), len(paths))
        self.report.unread_ages = len(ageless)
        for whom, row in patients.items():  # what is not said now stays as it was
            was = old.get(whom, {})
            if was.get("source"):  # and so does a reviewer's word
                self.report.reviewed_otherwise += row["diagnosis"] not in (None, was["diagnosis"])
                row |= {"diagnosis": None, "source_diagnosis": None}
            row |= {k: v for k, v in was.items() if row.get(k) is None}
        dataset.merge_rows(table, patients.values(), dataset.PATIENTS, ["site", "patient", "smear"], keep="last")
        mine = pa.Table.from_pylist([dict(zip(_FILE, file, strict=True)) for file in files], schema=dataset.FILES)
        mine = mine.set_column(0, "folder", pa.array([self.folder] * len(mine), pa.string()))
        others = files_before.filter(pc.invert(ours))
        unread = files_before.filter(
            pc.and_(pc.and_(ours, listed), pc.invert(pc.is_in(files_before["path"], mine["path"])))
        )
        after = pa.concat_tables([others, unread, mine])  # a path that this folder has no more goes
        if not after.equals(files_before):
            dataset.write_table(after, self.files_path, compression="zstd")
        # What a file of another folder says still stands: images that have one are not said anew by this folder alone.
        known_here, elsewhere = (set(rows["sha256"].to_pylist()) for rows in (files_before.filter(ours), others))
        return (spoken_of & known_here) - elsewhere

    def labels_of_imported(self, paths: list[str]) -> None:
        """Labels for images that are in the data set already, joined by the file names of their import."""
        if not self.files_path.exists():
            raise ImportSourceError(
                f"source '{self.source.name}' labels images of site '{self.site.name}' by file name, and {self.files_path} does "
                f"not list any. Import the images into {self.into} first, on this machine."
            )
        labels = [
            {**label, "sha256": file["sha256"]}
            for file in self.files().to_pylist()
            for label in self.tables.describe(file["path"], {}).labels
        ]
        if not labels:
            raise ImportSourceError(
                f"none of the {self.tables.num_rows} rows of '{self.source.name}' names an image of site '{self.site.name}'"
            )
        self.labels.append(pa.Table.from_pylist(labels, schema=dataset.LABELS))
        labelled = {row["sha256"] for row in labels}
        self.report.rows_without_image = self.tables.num_rows - len(labelled)
        others = [p for p in paths if p not in self.tables.files]
        for path in others:
            self.reject(path, "not_a_table", f"source '{self.source.name}' brings tables alone")
        with only_one(self.into):
            self.store(labelled, others)

    def sort(self, paths: list[str]) -> list[str]:
        """The images among the files; what is none is rejected."""
        candidates = []
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            if path in self.tables.files:
                continue
            if name.startswith("."):
                self.reject(path, "hidden_file", "the name starts with a dot")
            elif not name.lower().endswith(images.SUFFIXES):
                self.reject(path, "not_an_image", f"only {', '.join(images.SUFFIXES)} are read")
            elif self.pattern.search(path):
                candidates.append(path)
            else:
                self.reject(path, "not_in_layout", f"no path of source '{self.source.name}'")
        for path in self.tables.listed_but_missing(paths):
            self.report.found += 1
            self.reject(path, "missing", "listed in a table, but there is no such file")
        return candidates

    def pseudonym(self, kind: str, said: str | None) -> str | None:
        return pseudonyms.pseudonym(self.key, self.site.name, kind, said) if said else None

    def owner(self, item: Described) -> Json:
        """Whose cell it is: the columns that CELLS and PATIENTS share."""
        whose = {kind: self.pseudonym(kind, item.fields.get(kind)) for kind in ("patient", "smear")}
        return whose | {"site": self.site.name, "origin": self.site.origin}

    def reject(self, path: str, reason: str, detail: str, **known: Any) -> None:
        """Into quarantine."""
        where = {"site": self.site.name, "source": self.source.name, "folder": self.folder, "file": self.shown(path)}
        self.quarantine.append({**where, "reason": reason, "detail": detail, **known})
        self.report.quarantined[reason] += 1

    def shown(self, path: str) -> str | None:
        """A path as the quarantine shows it: where the site's identifiers are private its paths are too."""
        path = _printable(path)
        return path if self.site.identifiers == "public" else self.pseudonym("file", path)

    def cell(self, data: bytes, item: Described) -> Json | ImageError:
        """The picture's part of a row of CELLS, or why the picture, its scale or its date cannot be used."""
        try:
            pixels = images.check(data)
            said, acquired = item.fields.get("microns_per_px"), item.fields.get("acquired_at")
            if said and self.scale and not _agree(float(said), self.scale):
                raise ImageError("scale_contradicted", f"the table says {said} um/px, the site's file {self.scale}")
            scale = self.scale or (float(said) if said else None)
            if scale is not None and not LEAST < scale < MOST:
                raise ImageError("bad_table_value", f"{scale} um/px is no scale of a microscope's picture")
            moment = cbc.moment(acquired) if acquired else None
        except ImageError as error:
            return error
        except ValueError as error:
            return ImageError("bad_table_value", str(error)[:200])
        return {
            "image": images.without_metadata(data, pixels),
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "microns_per_px": scale,
            "scanner": self.site.scanner,
            "stain": self.site.stain,
            "acquired_at": moment,
            "source": self.source.name,
            "thumbnail": images.thumbnail(pixels).tobytes(),
        }

    def store(self, corrected: set[str], paths: list[str]) -> None:
        """Quarantine and labels, last: a run that was cut off before is made whole by running it again.

        What this source said before of a `corrected` image, and no longer says, goes; so does what the quarantine said of
        this folder's files.
        """
        seen_now, ours = {self.shown(p) for p in paths}, (self.site.name, self.source.name, self.folder)

        def stale(row: Any) -> bool:
            of_ours = (row.site, row.source, row.folder) == ours
            return of_ours and (row.file in seen_now or row.reason in ("missing", "deleted"))

        key = ["site", "folder", "file", "reason"]
        dataset.merge_rows(self.into / "quarantine.parquet", self.quarantine, dataset.QUARANTINE, key, drop=stale)
        labels = pa.concat_tables([dataset.LABELS.empty_table(), *self.labels])
        anew = labels.filter(pc.is_in(labels["sha256"], pa.array(corrected, pa.string())))
        said = set(zip(*(anew[name].to_pylist() for name in ("sha256", "name", "value")), strict=True))

        def withdrawn(row: Any) -> bool:
            of_ours = row.source == self.source.name and row.sha256 in corrected
            return of_ours and (row.sha256, row.name, row.value) not in said

        self.report.relabelled = dataset.merge_labels(self.into, self.site.name, labels, withdrawn, corrected)
        self.report.labels, self.report.conflicted = labelling.count(self.into)


def _patient(item: Described) -> Json:
    """A person's part of a row of PATIENTS."""
    age = pd.to_numeric(str(item.fields.get("age")).replace(",", "."), errors="coerce")
    return {
        "diagnosis": item.fields.get("diagnosis_code"),
        "source_diagnosis": item.fields.get("diagnosis"),
        "age": None if pd.isna(age) else float(age),
        "sex": item.fields.get("sex"),
    }


def _read(path: Path) -> tuple[str, bytes]:
    """The SHA-256 of a file and its bytes; nothing, and why, where it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return "", str(error.strerror).encode()
    return hashlib.sha256(data).hexdigest(), data
