"""Import: every file found under a folder ends up in the data set, or in quarantine with its reason.

The folder is read in sorted order, so that the same files make the same shards. A run that was killed is simply
run again: whole shards are known, half ones were never renamed into place.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from smearline import cbc, dataset, images, pseudonyms
from smearline.errors import ImageError, ImportSourceError, SiteError
from smearline.import_folders import listing, only_one
from smearline.sites import Site
from smearline.source_tables import Described, SourceTables
from smearline.sources import Source, at_end

Json = dict[str, Any]
Progress = Callable[[int, int], None]


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
    relabelled: int = 0
    other_identity: int = 0
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
            f"columns that mean nothing here: {', '.join(self.ignored_columns)}": self.ignored_columns,
            f"blood counts: {self.count_values} values": self.count_values,
        }
        return "\n".join(line for line, said in lines.items() if said)


def import_source(
    source: Source,
    root: Path,
    site: Site,
    into: Path,
    *,
    microns_per_px: float | None = None,
    progress: Progress | None = None,
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
    if into.resolve().is_relative_to(root.resolve()):
        raise ImportSourceError(f"--into {into} lies inside the folder that is imported; choose a place outside {root}")
    scale = site.microns_per_px
    for whose, said in ((f"source '{source.name}'", source.microns_per_px), ("--microns-per-px", microns_per_px)):
        if said is not None and scale is not None and not _agree(said, scale):
            raise SiteError(
                f"{whose} says {said} um/px, sites/{site.name}.yaml says {scale}. "
                "Correct the site's file, or import under the site that these images come from."
            )
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
    if report.other_identity:
        raise ImportSourceError(
            f"{report}\n{report.other_identity} images were imported before with another patient or smear than is "
            "said now. A shard never changes, so theirs stay as they were, and a split by patient would be wrong: import "
            "into a new folder."
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
        self.quarantine: list[Json] = []
        self.labels: list[Json] = []

    def known_files(self, new: list[Json]) -> pd.DataFrame:
        """The raw paths of the site's images, with the new ones."""
        return dataset.merge_rows(self.files_path, new, dataset.FILES, ["path", "sha256"])

    def images(self, root: Path, paths: list[str], progress: Progress | None) -> None:
        """Import every image among `paths`; all that can be refused is refused before anything is written."""
        found = [self.tables.describe(path, match.groupdict("")) for path, match in self.sort(paths)]
        if not found:
            raise ImportSourceError(
                f"no image under {root} fits the layout of '{self.source.name}' ({len(paths)} files found); "
                f"it expects .../{self.source.pattern}"
            )
        counts = [row for path in self.tables.count_files for row in cbc.read_counts(path, self.site, self.key)]
        with only_one(self.into):
            corrected = self.write(root, found, progress)
            known = dataset.merge_rows(self.into / "cbc" / f"{self.site.name}.parquet", counts, cbc.COUNTS, cbc.KEY)
            self.report.count_values = int(known["value"].notna().sum())
            self.store(corrected, paths)

    def write(self, root: Path, found: list[Described], progress: Progress | None) -> set[str]:
        """New images into new shards. Returns the images whose file was imported before: their labels are said anew."""
        there = _identities(self.into)
        before = self.known_files([])
        known = before[before["path"].isin([item.path for item in found])].drop_duplicates("sha256")
        owners = dict(zip(known["sha256"], known["path"], strict=True))  # the first with these bytes
        files: list[Json] = []
        patients: list[Json] = []
        with dataset.CellWriter(self.into / "cells", self.site.name) as writer:
            for done, item in enumerate(found, 1):
                if progress:
                    progress(done, len(found))
                try:
                    data = (root / item.path).read_bytes()
                except OSError as error:
                    self.reject(item.path, "unreadable", str(error.strerror))
                    continue
                sha256 = hashlib.sha256(data).hexdigest()
                owner, of = self.owner(item), {"sha256": sha256, "size_bytes": len(data)}
                site, *identity = there.get(sha256, (self.site.name, None, None))
                if owners.setdefault(sha256, item.path) != item.path or site != self.site.name:
                    where = f", an image of site '{site}'" if site != self.site.name else ""
                    self.reject(item.path, "duplicate", f"duplicate of {sha256}{where}", **of)
                elif sha256 in there:
                    self.report.already_there += 1
                    self.report.other_identity += identity != [owner["patient"], owner["smear"]]
                else:
                    try:
                        writer.add(owner | self.cell(data, item) | {"sha256": sha256})
                    except ImageError as error:
                        self.reject(item.path, error.reason, error.detail, **of)
                        continue
                    self.report.imported += 1
                files.append({"path": _printable(item.path), "sha256": sha256})
                self.report.unlabelled += not any(label["name"] == "type" for label in item.labels)
                self.labels += [{**label, "sha256": sha256} for label in item.labels]
                if owner["patient"]:
                    patients.append(owner | _patient(item))
        path = self.into / "labels" / f"patients-{self.site.name}.parquet"
        dataset.merge_rows(path, patients, dataset.PATIENTS, ["site", "patient", "smear"], keep="last")
        self.known_files(files)
        known_files = set(zip(before["path"], before["sha256"], strict=True))
        return {row["sha256"] for row in files if (row["path"], row["sha256"]) in known_files}

    def labels_of_imported(self, paths: list[str]) -> None:
        """Labels for images that are in the data set already, joined by the file names of their import."""
        if not self.files_path.exists():
            raise ImportSourceError(
                f"source '{self.source.name}' labels images of site '{self.site.name}' by file name, and {self.files_path} does "
                f"not list any. Import the images into {self.into} first, on this machine."
            )
        for file in self.known_files([]).itertuples():
            self.labels += [{**label, "sha256": file.sha256} for label in self.tables.describe(file.path, {}).labels]
        if not self.labels:
            raise ImportSourceError(
                f"none of the {self.tables.num_rows} rows of '{self.source.name}' names an image of site '{self.site.name}'"
            )
        labelled = {row["sha256"] for row in self.labels}
        self.report.rows_without_image = self.tables.num_rows - len(labelled)
        others = [p for p in paths if p not in self.tables.files]
        for path in others:
            self.reject(path, "not_a_table", f"source '{self.source.name}' brings tables alone")
        with only_one(self.into):
            self.store(labelled, others)

    def sort(self, paths: list[str]) -> list[tuple[str, re.Match[str]]]:
        """The images among the files, with the match of their paths; what is none is rejected."""
        candidates = []
        pattern = at_end(self.source.pattern)
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            if path in self.tables.files:
                continue
            if name.startswith("."):
                self.reject(path, "hidden_file", "the name starts with a dot")
            elif not name.lower().endswith(images.SUFFIXES):
                self.reject(path, "not_an_image", f"only {', '.join(images.SUFFIXES)} are read")
            elif match := pattern.search(path):
                candidates.append((path, match))
            else:
                self.reject(path, "not_in_layout", f"no path of source '{self.source.name}'")
        for path in self.tables.listed_but_missing(p for p, _ in candidates):
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
        whose = {"site": self.site.name, "source": self.source.name, "file": self.shown(path)}
        self.quarantine.append({**whose, "reason": reason, "detail": detail, **known})
        self.report.quarantined[reason] += 1

    def shown(self, path: str) -> str | None:
        """A path as the quarantine shows it: where the site's identifiers are private its paths are too."""
        path = _printable(path)
        return path if self.site.identifiers == "public" else self.pseudonym("file", path)

    def cell(self, data: bytes, item: Described) -> Json:
        """The picture's part of a row of CELLS. Raises ImageError where the picture, its scale or its date cannot be used."""
        pixels = images.check(data)
        try:
            said, acquired = item.fields.get("microns_per_px"), item.fields.get("acquired_at")
            if said and self.scale and not _agree(float(said), self.scale):
                raise ImageError("scale_contradicted", f"the table says {said} um/px, the site's file {self.scale}")
            scale = self.scale or (float(said) if said else None)
            moment = pd.to_datetime(acquired, utc=True).to_pydatetime() if acquired else None
        except ValueError as error:
            raise ImageError("bad_table_value", str(error)[:200]) from error
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
        the files looked at now.
        """
        seen_now, ours = {self.shown(p) for p in paths}, (self.site.name, self.source.name)

        def stale(row: Any) -> bool:
            return (row.site, row.source) == ours and (row.file in seen_now or row.reason == "missing")

        key = ["site", "file", "reason"]
        dataset.merge_rows(self.into / "quarantine.parquet", self.quarantine, dataset.QUARANTINE, key, drop=stale)
        said = {(r["sha256"], r["name"], r["value"]) for r in self.labels}
        named = {(sha256, name) for sha256, name, _ in said}

        def withdrawn(row: Any) -> bool:
            of_ours = row.source == self.source.name and row.sha256 in corrected and (row.sha256, row.name) in named
            return of_ours and (row.sha256, row.name, row.value) not in said

        key, path = ["sha256", "name", "value", "labelled_by", "source"], dataset.labels_path(self.into, self.site.name)
        before = len(dataset.merge_rows(path, [], dataset.LABELS, key))
        self.report.relabelled = before - len(dataset.merge_rows(path, [], dataset.LABELS, key, drop=withdrawn))
        dataset.merge_rows(path, self.labels, dataset.LABELS, key)
        labels = dataset.read_labels(self.into)
        self.report.labels = len(labels)
        self.report.conflicted = int(labels.loc[labels["conflicted"], "sha256"].nunique())


def _patient(item: Described) -> Json:
    """A person's part of a row of PATIENTS."""
    age = pd.to_numeric(item.fields.get("age"), errors="coerce")
    return {
        "diagnosis": item.fields.get("diagnosis_code"),
        "source_diagnosis": item.fields.get("diagnosis"),
        "age": None if pd.isna(age) else float(age),
        "sex": item.fields.get("sex"),
    }


def _identities(into: Path) -> dict[str, tuple[str, str | None, str | None]]:
    """sha256 to site, patient and smear, of the images that are there."""
    if not any((into / "cells").glob("[!.]*.parquet")):
        return {}
    frame = dataset.index(into, ["sha256", "site", "patient", "smear"]).astype(object)
    frame = frame.where(frame.notna(), None)
    return dict(zip(frame["sha256"], zip(frame["site"], frame["patient"], frame["smear"], strict=True), strict=True))
