"""Import: every file found under a folder ends up in the data set, or in quarantine with its reason.

The folder is read in sorted order, so that the same files make the same shards. A run that was killed is simply
run again: whole shards are known, half ones were never renamed into place.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
)
from smearline.errors import ImageError, ImportSourceError, SiteError
from smearline.sites import Site
from smearline.source_tables import SourceTables
from smearline.sources import Source

Progress = Callable[[int, int], None]


@dataclass
class ImportReport:
    """What became of the files. `found` is the sum of the others; `check` holds it to that."""

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

    def check(self) -> None:
        placed = self.imported + self.already_there + self.tables + self.quarantined.total()
        assert placed == self.found, f"{self.found} files found, {placed} accounted for"

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {r}" for r, n in self.quarantined.most_common()) or "none"
        return "\n".join(
            [
                f"{self.found} files found = {self.imported} imported + {self.already_there} there already"
                f" + {self.tables} tables read + {self.quarantined.total()} quarantined",
                f"quarantined: {reasons}",
                f"labels: {self.labels} in all; {self.conflicted} images conflicted (left out of training and scoring), "
                f"{self.unlabelled} images of this run unlabelled",
                *([f"table rows without an image here: {self.rows_without_image}"] if self.rows_without_image else []),
                *([f"blood counts: {self.count_values} values"] if self.count_values else []),
            ]
        )


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
    _check_scale(source, site, microns_per_px)
    tables = SourceTables.read(source, root)
    run = _Import(source, site, into, tables)
    # A broken link is a file that cannot be read, not nothing.
    paths = sorted(
        p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file() or (p.is_symlink() and not p.exists())
    )
    run.report.found, run.report.tables = len(paths), len(tables.files)
    if source.images == "imported":
        run.labels_of_imported([p for p in paths if p not in tables.files])
    else:
        run.images(root, paths, progress)
    run.report.check()
    return run.report


def _check_scale(source: Source, site: Site, given: float | None) -> None:
    for whose, scale in ((f"source '{source.name}'", source.microns_per_px), ("--microns-per-px", given)):
        if scale is not None and not _agrees(scale, site):
            raise SiteError(
                f"{whose} says {scale} um/px, sites/{site.name}.yaml says {site.microns_per_px}. "
                "Correct the site's file, or import under the site that these images come from."
            )


def _agrees(scale: float, site: Site) -> bool:
    return site.microns_per_px is not None and abs(scale / site.microns_per_px - 1) <= 0.01


class _Import:
    """One run: what was found, and what of it goes where."""

    def __init__(self, source: Source, site: Site, into: Path, tables: SourceTables) -> None:
        self.source, self.site, self.into, self.tables = source, site, into, tables
        self.report = ImportReport()
        self.key = pseudonyms.key(site)
        self.files_path = into / "local" / f"files-{site.name}.parquet"
        self.quarantine: list[dict[str, Any]] = []
        self.labels: list[dict[str, Any]] = []

    def images(self, root: Path, paths: list[str], progress: Progress | None) -> None:
        """Import every image among `paths`."""
        found = [self.describe(path, groups) for path, groups in self.sort(paths)]
        if not found:
            raise ImportSourceError(
                f"no image under {root} fits the layout of '{self.source.name}' ({len(paths)} files found); "
                f"it expects .../{self.source.pattern}"
            )
        there = _sites_by_sha256(self.into)
        listed = {item.path for item in found}
        owners: dict[str, str] = {}  # the first file with these bytes; later ones are its duplicates
        for known in merge_rows(self.files_path, [], FILES, ["path", "sha256"]).itertuples():
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
                owner = owners.setdefault(sha256, item.path)
                if owner != item.path or there.get(sha256, self.site.name) != self.site.name:
                    where = f", an image of site '{there[sha256]}'" if sha256 in there else ""
                    self.reject(item.path, "duplicate", f"duplicate of {sha256}{where}", sha256, len(data))
                elif sha256 in there:
                    self.report.already_there += 1
                else:
                    try:
                        writer.add(self.cell(data, sha256, item))
                    except ImageError as error:
                        self.reject(item.path, error.reason, error.detail, sha256, len(data))
                        continue
                    self.report.imported += 1
                files.append({"path": item.path, "sha256": sha256})
                self.report.unlabelled += not any(name == "type" for name, *_ in item.labels)
                self.labels += [self.label(sha256, said, item.fields) for said in item.labels]
                if item.patient:
                    patients[item.patient, item.smear] = self.patient(item)
        self.report.count_values = cbc.import_counts(self.tables.count_files, self.site, self.key, self.into / "cbc")
        path = self.into / "labels" / f"patients-{self.site.name}.parquet"
        merge_rows(path, patients.values(), PATIENTS, ["site", "patient", "smear"], keep="last")
        merge_rows(self.files_path, files, FILES, ["path", "sha256"])
        self.store()

    def labels_of_imported(self, others: list[str]) -> None:
        """Labels for images that are in the data set already, joined by the file names of their import."""
        if not self.files_path.exists():
            raise ImportSourceError(
                f"source '{self.source.name}' labels images of site '{self.site.name}' by file name, and {self.files_path} does "
                f"not list any. Import the images into {self.into} first, on this machine."
            )
        for known in merge_rows(self.files_path, [], FILES, ["path", "sha256"]).itertuples():
            item = self.describe(known.path, {})
            self.labels += [self.label(known.sha256, said, item.fields) for said in item.labels]
        if not self.labels:
            raise ImportSourceError(
                f"none of the {self.tables.num_rows} rows of '{self.source.name}' names an image of site '{self.site.name}'"
            )
        self.report.rows_without_image = self.tables.num_rows - len({row["sha256"] for row in self.labels})
        for path in others:
            self.reject(path, "not_a_table", f"source '{self.source.name}' brings tables alone")
        self.store()

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
        templates = {
            "class": self.source.class_from,
            "patient": self.source.patient_from,
            "smear": self.source.smear_from,
        }
        fields: dict[str, Any] = {k: t.format_map(known) for k, t in templates.items() if t}
        labels = []
        for table, row in self.tables.rows_for({**known, **fields}):
            fields |= self.tables.meanings(table, row)
            if table.characteristics:
                labels += [(n, v, v, self.source.labelled_by, "reference") for n, v in self.tables.characteristics(row)]
        for meaning, role in (
            ("class", ""),
            ("reannotation_1", ", re-annotation"),
            ("reannotation_2", ", re-annotation"),
        ):
            if said := fields.get(meaning):
                by = self.source.labelled_by + role
                labels.append(("type", self.source.type_code(said), said, by, "reannotation" if role else "reference"))
        diagnosis = vocabulary.load().diagnosis_code(fields["diagnosis"]) if fields.get("diagnosis") else None
        return _Found(
            path, fields, tuple(labels), self.pseudonym("patient", fields), self.pseudonym("smear", fields), diagnosis
        )

    def pseudonym(self, kind: str, fields: Mapping[str, Any]) -> str | None:
        said = fields.get(kind)
        return pseudonyms.pseudonym(self.key, self.site.name, kind, said) if said else None

    def reject(self, path: str, reason: str, detail: str, sha256: str | None = None, size: int | None = None) -> None:
        """Into quarantine. Where the site's identifiers are private its paths are too."""
        public = self.site.identifiers == "public"
        shown = path if public else pseudonyms.pseudonym(self.key, self.site.name, "file", path)
        whose = {"site": self.site.name, "source": self.source.name, "file": shown, "sha256": sha256}
        self.quarantine.append({**whose, "reason": reason, "detail": detail, "size_bytes": size})
        self.report.quarantined[reason] += 1

    def cell(self, data: bytes, sha256: str, item: _Found) -> dict[str, Any]:
        """A row of CELLS. Raises ImageError where the picture, its scale or its date cannot be used."""
        pixels = images.check(data)
        try:
            scale = item.fields.get("microns_per_px")
            if scale and not _agrees(float(scale), self.site):
                detail = f"the table says {scale} um/px, the site's file {self.site.microns_per_px}"
                raise ImageError("scale_contradicted", detail)
            acquired = item.fields.get("acquired_at")
            moment = pd.to_datetime(acquired, utc=True).to_pydatetime() if acquired else None
        except ValueError as error:
            raise ImageError("bad_table_value", str(error)[:200]) from error
        return {
            "sha256": sha256,
            "image": images.without_metadata(data),
            "width": pixels.shape[1],
            "height": pixels.shape[0],
            "microns_per_px": self.site.microns_per_px,
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

    def label(self, sha256: str, said: tuple[str, str, str, str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
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

    def store(self) -> None:
        """Quarantine and labels, last: a run that was cut off before is made whole by running it again."""
        merge_rows(self.into / "quarantine.parquet", self.quarantine, QUARANTINE, ["site", "file", "reason"])
        key = ["sha256", "name", "value", "labelled_by", "source"]
        merged = merge_rows(labels_path(self.into, self.site.name), self.labels, LABELS, key)
        self.report.labels = len(merged)
        self.report.conflicted = int(merged.loc[merged["conflicted"], "sha256"].nunique())


def _sites_by_sha256(into: Path) -> dict[str, str]:
    if not any((into / "cells").glob("[!.]*.parquet")):
        return {}
    frame = index(into, ["sha256", "site"])
    return dict(zip(frame["sha256"], frame["site"], strict=True))
