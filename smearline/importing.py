"""Import: every file found under a folder ends up in the data set, or in quarantine with its reason.

The folder is read in sorted order, so that the same files make the same shards. A run that was killed is simply
run again: whole shards are known, half ones were never renamed into place.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from smearline import cbc, images, pseudonyms, vocabulary
from smearline.dataset import (
    FILES,
    LABELS,
    PATIENTS,
    QUARANTINE,
    CellWriter,
    index,
    labels_path,
    merge_rows,
    read_labels,
)
from smearline.errors import ImageError, ImportSourceError, SiteError
from smearline.import_folders import listing, only_one
from smearline.import_report import ImportReport
from smearline.sites import Site
from smearline.source_tables import SourceTables
from smearline.sources import Source

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Found:
    """An image file and all that its path and the tables say of it."""

    path: str
    fields: Mapping[str, Any]
    labels: tuple[tuple[str, str, str, str, str], ...]
    """(name, value, source label, labelled by, role)"""
    patient: str | None
    smear: str | None
    """Pseudonyms."""
    diagnosis: str | None


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
    scale = _known_scale(source, site, microns_per_px)
    paths, unreadable = listing(root)
    tables = SourceTables.read(source, root, paths)
    run = _Import(source, site, into, tables, scale)
    run.report.found, run.report.tables = len(paths) + len(unreadable), len(tables.files)
    run.report.ignored_columns = tables.ignored_columns
    for path in unreadable:
        run.reject(path, "unreadable", "the folder cannot be listed")
    if source.images == "imported":
        run.labels_of_imported([p for p in paths if p not in tables.files])
    else:
        run.images(root, paths, progress)
    run.report.check()
    if run.report.other_identity:
        raise ImportSourceError(
            f"{run.report}\n{run.report.other_identity} images were imported before with another patient or smear than is "
            "said now. A shard never changes, so theirs stay as they were, and a split by patient would be wrong: import "
            "into a new folder."
        )
    return run.report


def _known_scale(source: Source, site: Site, given: float | None) -> float | None:
    """The scale of these images as the site's file, the source and the user say it; they must agree."""
    known = site.microns_per_px
    for whose, scale in ((f"source '{source.name}'", source.microns_per_px), ("--microns-per-px", given)):
        if scale is not None and known is not None and not _agree(scale, known):
            raise SiteError(
                f"{whose} says {scale} um/px, sites/{site.name}.yaml says {known}. "
                "Correct the site's file, or import under the site that these images come from."
            )
        known = known if known is not None else scale
    return known


def _agree(one: float, other: float) -> bool:
    return abs(one / other - 1) <= 0.01


def _printable(path: str) -> str:
    """A path of any bytes as text that can be stored."""
    return path.encode("utf-8", "backslashreplace").decode()


class _Import:
    """One run: what was found, and what of it goes where."""

    def __init__(self, source: Source, site: Site, into: Path, tables: SourceTables, scale: float | None) -> None:
        self.source, self.site, self.into, self.tables, self.scale = source, site, into, tables, scale
        self.report = ImportReport()
        self.key = pseudonyms.key(site)
        self.files_path = into / "local" / f"files-{site.name}.parquet"
        self.quarantine: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []

    def images(self, root: Path, paths: list[str], progress: Progress | None) -> None:
        """Import every image among `paths`; all that can be refused is refused before anything is written."""
        found = [self.describe(path, groups) for path, groups in self.sort(paths)]
        if not found:
            raise ImportSourceError(
                f"no image under {root} fits the layout of '{self.source.name}' ({len(paths)} files found); "
                f"it expects .../{self.source.pattern}"
            )
        counts = [row for path in self.tables.count_files for row in cbc.read_counts(path, self.site, self.key)]
        with only_one(self.into):
            corrected = self.write(root, found, progress)
            known = merge_rows(self.into / "cbc" / f"{self.site.name}.parquet", counts, cbc.COUNTS, cbc.KEY)
            self.report.count_values = int(known["value"].notna().sum())
            self.store(corrected, paths)

    def write(self, root: Path, found: list[_Found], progress: Progress | None) -> set[str]:
        """New images into new shards. Returns the images whose file was imported before: their labels are said anew."""
        there = _identities(self.into)
        listed = {item.path for item in found}
        owners: dict[str, str] = {}  # the first file with these bytes; later ones are its duplicates
        before = merge_rows(self.files_path, [], FILES, ["path", "sha256"])
        for known in before.itertuples():
            if known.path in listed:
                owners.setdefault(known.sha256, known.path)
        patients: dict[tuple[str, str | None], dict[str, Any]] = {}
        files: list[dict[str, str]] = []
        with CellWriter(self.into / "cells", self.site.name) as writer:
            for done, item in enumerate(found, 1):
                if progress:
                    progress(done, len(found))
                try:
                    data = (root / item.path).read_bytes()
                except OSError as error:
                    self.reject(item.path, "unreadable", str(error.strerror))
                    continue
                sha256 = hashlib.sha256(data).hexdigest()
                site, *identity = there.get(sha256, (self.site.name, item.patient, item.smear))
                if owners.setdefault(sha256, item.path) != item.path or site != self.site.name:
                    where = f", an image of site '{site}'" if site != self.site.name else ""
                    self.reject(item.path, "duplicate", f"duplicate of {sha256}{where}", sha256, len(data))
                elif sha256 in there:
                    self.report.already_there += 1
                    self.report.other_identity += identity != [item.patient, item.smear]
                else:
                    try:
                        writer.add(self.cell(data, sha256, item))
                    except ImageError as error:
                        self.reject(item.path, error.reason, error.detail, sha256, len(data))
                        continue
                    self.report.imported += 1
                files.append({"path": _printable(item.path), "sha256": sha256})
                self.report.unlabelled += not any(name == "type" for name, *_ in item.labels)
                self.labels += [self.label(sha256, said) for said in item.labels]
                if item.patient:
                    patients[item.patient, item.smear] = self.patient(item)
        path = self.into / "labels" / f"patients-{self.site.name}.parquet"
        merge_rows(path, patients.values(), PATIENTS, ["site", "patient", "smear"], keep="last")
        merge_rows(self.files_path, files, FILES, ["path", "sha256"])
        known_files = set(zip(before["path"], before["sha256"], strict=True))
        return {row["sha256"] for row in files if (row["path"], row["sha256"]) in known_files}

    def labels_of_imported(self, others: list[str]) -> None:
        """Labels for images that are in the data set already, joined by the file names of their import."""
        if not self.files_path.exists():
            raise ImportSourceError(
                f"source '{self.source.name}' labels images of site '{self.site.name}' by file name, and {self.files_path} does "
                f"not list any. Import the images into {self.into} first, on this machine."
            )
        for known in merge_rows(self.files_path, [], FILES, ["path", "sha256"]).itertuples():
            item = self.describe(known.path, {})
            self.labels += [self.label(known.sha256, said) for said in item.labels]
        if not self.labels:
            raise ImportSourceError(
                f"none of the {self.tables.num_rows} rows of '{self.source.name}' names an image of site '{self.site.name}'"
            )
        self.report.rows_without_image = self.tables.num_rows - len({row["sha256"] for row in self.labels})
        for path in others:
            self.reject(path, "not_a_table", f"source '{self.source.name}' brings tables alone")
        with only_one(self.into):
            self.store({row["sha256"] for row in self.labels}, others)

    def sort(self, paths: list[str]) -> list[tuple[str, dict[str, str]]]:
        """The images among the files, with the groups of their paths; what is none is rejected."""
        candidates = []
        for path in paths:
            name = path.rsplit("/", 1)[-1]
            match = self.source.path_pattern.search(path)
            if path in self.tables.files:
                continue
            if name.startswith("."):
                self.reject(path, "hidden_file", "the name starts with a dot")
            elif not name.lower().endswith(images.SUFFIXES):
                self.reject(path, "not_an_image", f"only {', '.join(images.SUFFIXES)} are read")
            elif match is None:
                self.reject(path, "not_in_layout", f"no path of source '{self.source.name}'")
            else:
                candidates.append((path, {k: v or "" for k, v in match.groupdict().items()}))
        for path in self.tables.listed_but_missing({p for p, _ in candidates}):
            self.report.found += 1
            self.reject(path, "missing", "listed in a table, but there is no such file")
        return candidates

    def describe(self, path: str, groups: dict[str, str]) -> _Found:
        """All that is said of a file, its labels checked against the vocabulary."""
        known = {"class": "", **groups, "path": path, "name": path.rsplit("/", 1)[-1]}
        source = self.source
        templates = {"class": source.class_from, "patient": source.patient_from, "smear": source.smear_from}
        fields: dict[str, Any] = {k: t.format_map(known) for k, t in templates.items() if t}
        labels: list[tuple[str, str, str, str, str]] = []
        classes: list[str | None] = []
        for table, row in self.tables.rows_for({**known, **fields}):
            said = self.tables.meanings(table, row)
            fields |= said
            classes += [said["class"]] if "class" in said else []
            if table.characteristics:
                labels += [(n, v, v, source.labelled_by, "reference") for n, v in self.tables.characteristics(row)]
        types = [(label, "", "reference") for label in classes or [fields.get("class")]]
        for number in (1, 2):
            types.append((fields.get(f"reannotation_{number}"), ", re-annotation", "reannotation"))
        for label, by, role in types:
            if label and (code := source.type_code(label)):
                labels.append(("type", code, label, source.labelled_by + by, role))
        diagnosis = vocabulary.load().diagnosis_code(fields["diagnosis"]) if fields.get("diagnosis") else None
        patient, smear = (self.pseudonym(kind, fields) for kind in ("patient", "smear"))
        return _Found(path, fields, tuple(labels), patient, smear, diagnosis)

    def pseudonym(self, kind: str, fields: Mapping[str, Any]) -> str | None:
        said = fields.get(kind)
        return pseudonyms.pseudonym(self.key, self.site.name, kind, said) if said else None

    def reject(self, path: str, reason: str, detail: str, sha256: str | None = None, size: int | None = None) -> None:
        """Into quarantine. Where the site's identifiers are private its paths are too."""
        whose = {"site": self.site.name, "source": self.source.name, "file": self.shown(path), "sha256": sha256}
        self.quarantine.append({**whose, "reason": reason, "detail": detail, "size_bytes": size})
        self.report.quarantined[reason] += 1

    def shown(self, path: str) -> str:
        """A path as the quarantine shows it."""
        path = _printable(path)
        return (
            path if self.site.identifiers == "public" else pseudonyms.pseudonym(self.key, self.site.name, "file", path)
        )

    def cell(self, data: bytes, sha256: str, item: _Found) -> dict[str, Any]:
        """A row of CELLS. Raises ImageError where the picture, its scale or its date cannot be used."""
        pixels = images.check(data)
        try:
            said = item.fields.get("microns_per_px")
            if said and self.scale and not _agree(float(said), self.scale):
                raise ImageError("scale_contradicted", f"the table says {said} um/px, the site's file {self.scale}")
            scale = self.scale or (float(said) if said else None)
            acquired = item.fields.get("acquired_at")
            moment = pd.to_datetime(acquired, utc=True).to_pydatetime() if acquired else None
        except ValueError as error:
            raise ImageError("bad_table_value", str(error)[:200]) from error
        return {
            "sha256": sha256,
            "image": images.without_metadata(data, pixels),
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "microns_per_px": scale,
            "site": self.site.name,
            "scanner": self.site.scanner,
            "stain": self.site.stain,
            "patient": item.patient,
            "smear": item.smear,
            "acquired_at": moment,
            "origin": self.site.origin,
            "source": self.source.name,
            "thumbnail": images.thumbnail(pixels).tobytes(),
        }

    def label(self, sha256: str, said: tuple[str, str, str, str, str]) -> dict[str, Any]:
        """A row of LABELS; `merge_rows` works out whether it is conflicted."""
        named = dict(zip(("name", "value", "source_label", "labelled_by", "role"), said, strict=True))
        version = vocabulary.load().version
        return {"sha256": sha256, **named, "vocabulary": version, "source": self.source.name, "conflicted": False}

    def patient(self, item: _Found) -> dict[str, Any]:
        """A row of PATIENTS."""
        age = pd.to_numeric(item.fields.get("age"), errors="coerce")
        return {
            "site": self.site.name,
            "patient": item.patient,
            "smear": item.smear,
            "diagnosis": item.diagnosis,
            "source_diagnosis": item.fields.get("diagnosis"),
            "age": None if pd.isna(age) else float(age),
            "sex": item.fields.get("sex"),
            "origin": self.site.origin,
        }

    def store(self, corrected: set[str], paths: list[str]) -> None:
        """Quarantine and labels, last: a run that was cut off before is made whole by running it again.

        What this source said before of a `corrected` image, and no longer says, goes; so does what the quarantine said of
        the files looked at now.
        """
        seen_now = {self.shown(p) for p in paths}
        ours = (self.site.name, self.source.name)

        def stale(row: Any) -> bool:
            return (row.site, row.source) == ours and (row.file in seen_now or row.reason == "missing")

        merge_rows(
            self.into / "quarantine.parquet", self.quarantine, QUARANTINE, ["site", "file", "reason"], drop=stale
        )
        said = {(r["sha256"], r["name"], r["value"]) for r in self.labels}
        named = {(r["sha256"], r["name"]) for r in self.labels}

        def withdrawn(row: Any) -> bool:
            of_ours = row.source == self.source.name and row.sha256 in corrected and (row.sha256, row.name) in named
            return of_ours and (row.sha256, row.name, row.value) not in said

        key = ["sha256", "name", "value", "labelled_by", "source"]
        path = labels_path(self.into, self.site.name)
        before = len(merge_rows(path, [], LABELS, key))
        self.report.relabelled = before - len(merge_rows(path, [], LABELS, key, drop=withdrawn))
        merge_rows(path, self.labels, LABELS, key)
        labels = read_labels(self.into)
        self.report.labels = len(labels)
        self.report.conflicted = int(labels.loc[labels["conflicted"], "sha256"].nunique())


def _identities(into: Path) -> dict[str, tuple[str, str | None, str | None]]:
    """sha256 to site, patient and smear, of the images that are there."""
    if not any((into / "cells").glob("[!.]*.parquet")):
        return {}
    frame = index(into, ["sha256", "site", "patient", "smear"]).astype(object)
    frame = frame.where(frame.notna(), None)
    return {row.sha256: (row.site, row.patient, row.smear) for row in frame.itertuples()}
