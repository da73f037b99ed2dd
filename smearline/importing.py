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
    CELLS,
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
    report = ImportReport()
    tables = SourceTables.read(source, root)
    paths = sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    report.found, report.tables = len(paths), len(tables.files)
    if source.images == "imported":
        return _import_labels(source, tables, paths, site, into, report)

    candidates, rejected = _sort_files(source, tables, paths)
    if not candidates:
        raise ImportSourceError(
            f"no image under {root} fits the layout of '{source.name}' ({len(paths)} files found); it expects .../{source.pattern}"
        )
    found = [_describe(source, tables, path, fields) for path, fields in candidates]
    _import_images(source, root, site, into, found, rejected, tables, report, progress)
    report.check()
    return report


def _check_scale(source: Source, site: Site, given: float | None) -> None:
    for whose, scale in ((f"source '{source.name}'", source.microns_per_px), ("--microns-per-px", given)):
        if scale is None:
            continue
        if site.microns_per_px is None or abs(scale / site.microns_per_px - 1) > 0.01:
            raise SiteError(
                f"{whose} says {scale} um/px, sites/{site.name}.yaml says {site.microns_per_px}. "
                "Correct the site's file, or import under the site that these images come from."
            )


def _sort_files(
    source: Source, tables: SourceTables, paths: list[str]
) -> tuple[list[tuple[str, dict[str, str]]], list[tuple[str, str, str]]]:
    """(path, groups) of the images, and (path, reason, detail) of what is none."""
    candidates, rejected = [], []
    for path in paths:
        name = path.rsplit("/", 1)[-1]
        match = source.path_pattern.search(path)
        if path in tables.files:
            continue
        if name.startswith("."):
            rejected.append((path, "hidden_file", "the name starts with a dot"))
        elif not name.lower().endswith(images.SUFFIXES):
            rejected.append((path, "not_an_image", f"only {', '.join(images.SUFFIXES)} are read"))
        elif match is None:
            rejected.append((path, "not_in_layout", f"no path of source '{source.name}'"))
        else:
            candidates.append((path, {k: v or "" for k, v in match.groupdict().items()}))
    for path in tables.listed_but_missing({p for p, _ in candidates}):
        rejected.append((path, "missing", "listed in a table, but there is no such file"))
    return candidates, rejected


def _describe(source: Source, tables: SourceTables, path: str, groups: dict[str, str]) -> _Found:
    known = {**groups, "path": path, "name": path.rsplit("/", 1)[-1]}
    known["stem"] = known["name"].rsplit(".", 1)[0]
    templates = {"class": source.class_from, "patient": source.patient_from, "smear": source.smear_from}
    fields = {k: t.format_map({"class": "", **known}) for k, t in templates.items() if t} | {}
    labels = []
    for table, row in tables.rows_for({**known, **fields}):
        fields |= tables.meanings(table, row)
        if table.characteristics:
            labels += [
                (n, v, v, table.labelled_by or source.labelled_by, "reference") for n, v in tables.characteristics(row)
            ]
    for role, said in (
        ("reference", fields.get("class")),
        *(("reannotation", fields.get(f"reannotation_{i}")) for i in (1, 2)),
    ):
        if said:
            by = source.labelled_by if role == "reference" else f"{source.labelled_by}, re-annotation"
            labels.append(("type", source.type_code(said), said, by, role))
    return _Found(path, fields, tuple(labels))


def _import_images(
    source: Source,
    root: Path,
    site: Site,
    into: Path,
    found: list[_Found],
    rejected: list[tuple[str, str, str]],
    tables: SourceTables,
    report: ImportReport,
    progress: Progress | None,
) -> None:
    words = vocabulary.load()
    key = pseudonyms.key(site)
    there = _sites_by_sha256(into)
    files_path = into / "local" / f"files-{site.name}.parquet"
    owners: dict[str, str] = {}  # the first file with these bytes; later ones are its duplicates
    for known in merge_rows(files_path, [], FILES, ["path", "sha256"]).itertuples():
        owners.setdefault(known.sha256, known.path)
    quarantine: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    patients: dict[tuple[str, str | None], dict[str, Any]] = {}
    files: list[dict[str, str]] = []

    def reject(path: str, reason: str, detail: str, sha256: str | None = None, size: int | None = None) -> None:
        shown = path if site.identifiers == "public" else pseudonyms.pseudonym(key, site.name, "file", path)
        quarantine.append(
            dict(
                site=site.name,
                source=source.name,
                file=shown,
                sha256=sha256,
                reason=reason,
                detail=detail,
                size_bytes=size,
            )
        )
        report.quarantined[reason] += 1
        if reason == "missing":
            report.found += 1

    for path, reason, detail in rejected:
        reject(path, reason, detail)
    seen: set[str] = set()
    with CellWriter(into / "cells", site.name) as writer:
        for done, item in enumerate(found, 1):
            if progress:
                progress(done, len(found))
            data = (root / item.path).read_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            owner = owners.setdefault(sha256, item.path)
            duplicate = sha256 in seen or there.get(sha256, site.name) != site.name or owner != item.path
            row = None
            try:
                if sha256 not in there and not duplicate:
                    row = _cell(data, sha256, site, source, item.fields, key)
            except ImageError as error:
                reject(item.path, error.reason, error.detail, sha256, len(data))
                continue
            if duplicate:
                reject(item.path, "duplicate", f"duplicate of {sha256}, imported from another file", sha256, len(data))
            elif row is None:
                report.already_there += 1
            else:
                report.imported += 1
                writer.add(row)
            seen.add(sha256)
            files.append({"path": item.path, "sha256": sha256})
            report.unlabelled += not any(name == "type" for name, *_ in item.labels)
            labels += [_label(sha256, said, source, words.version, item.fields) for said in item.labels]
            if row and row["patient"]:
                patients[row["patient"], row["smear"]] = _patient(row, site, item.fields)

    report.count_values = cbc.import_counts(tables.count_files, site, key, into / "cbc")
    merge_rows(into / "quarantine.parquet", quarantine, QUARANTINE, ["site", "file", "reason"])
    merge_rows(
        into / "labels" / f"patients-{site.name}.parquet", patients.values(), PATIENTS, ["site", "patient", "smear"]
    )
    merge_rows(files_path, files, FILES, ["path", "sha256"])
    _store_labels(into, site, labels, report)


def _store_labels(into: Path, site: Site, labels: list[dict[str, Any]], report: ImportReport) -> None:
    merged = merge_rows(
        labels_path(into, site.name), labels, LABELS, ["sha256", "name", "value", "labelled_by", "source"]
    )
    report.labels = len(merged)
    report.conflicted = int(merged.loc[merged["conflicted"], "sha256"].nunique())


def _sites_by_sha256(into: Path) -> dict[str, str]:
    if not any((into / "cells").glob("[!.]*.parquet")):
        return {}
    frame = index(into, ["sha256", "site"])
    return dict(zip(frame["sha256"], frame["site"], strict=True))


def _cell(
    data: bytes, sha256: str, site: Site, source: Source, fields: Mapping[str, Any], key: bytes
) -> dict[str, Any]:
    pixels = images.check(data)
    scale = fields.get("microns_per_px")
    if scale is not None and (site.microns_per_px is None or abs(float(scale) / site.microns_per_px - 1) > 0.01):
        raise ImageError("scale_contradicted", f"table says {scale} um/px, the site's file {site.microns_per_px}")
    pseudonym = {
        kind: pseudonyms.pseudonym(key, site.name, kind, str(fields[kind])) if fields.get(kind) else None
        for kind in ("patient", "smear")
    }
    acquired = fields.get("acquired_at")
    values = {
        "sha256": sha256,
        "image": images.without_metadata(data),
        "width": pixels.shape[1],
        "height": pixels.shape[0],
        "microns_per_px": site.microns_per_px,
        "site": site.name,
        "scanner": site.scanner,
        "stain": site.stain,
        **pseudonym,
        "acquired_at": pd.to_datetime(acquired, utc=True).to_pydatetime() if acquired else None,
        "origin": site.origin,
        "source": source.name,
        "thumbnail": images.thumbnail(pixels).tobytes(),
    }
    return {name: values[name] for name in CELLS.names}


def _label(
    sha256: str, said: tuple[str, str, str, str, str], source: Source, version: str, fields: Mapping[str, Any]
) -> dict[str, Any]:
    name, value, source_label, labelled_by, role = said
    return dict(
        sha256=sha256,
        name=name,
        value=value,
        source_label=source_label,
        labelled_by=labelled_by,
        labelled_at=fields.get("labelled_at"),
        role=role,
        vocabulary=version,
        source=source.name,
        conflicted=False,
    )


def _patient(row: Mapping[str, Any], site: Site, fields: Mapping[str, Any]) -> dict[str, Any]:
    said = fields.get("diagnosis")
    return dict(
        site=site.name,
        patient=row["patient"],
        smear=row["smear"],
        diagnosis=vocabulary.load().diagnosis_code(said) if said else None,
        source_diagnosis=said,
        age=float(fields["age"]) if fields.get("age") else None,
        sex=fields.get("sex"),
        origin=site.origin,
    )


def _import_labels(
    source: Source, tables: SourceTables, paths: list[str], site: Site, into: Path, report: ImportReport
) -> ImportReport:
    """Labels for images that are in the data set already, joined by the file names of their import."""
    files_path = into / "local" / f"files-{site.name}.parquet"
    if not files_path.exists():
        raise ImportSourceError(
            f"source '{source.name}' labels images of site '{site.name}' by file name, and {files_path} does not list any. "
            f"Import the images into {into} first, on this machine."
        )
    files = merge_rows(files_path, [], FILES, ["path", "sha256"])
    version = vocabulary.load().version
    labels: list[dict[str, Any]] = []
    for path, sha256 in zip(files["path"], files["sha256"], strict=True):
        item = _describe(source.model_copy(update={"class_from": ""}), tables, path, {})
        labels += [_label(sha256, said, source, version, item.fields) for said in item.labels]
    others = [p for p in paths if p not in tables.files]
    report.quarantined["not_a_table_of_this_source"] = len(others)
    report.rows_without_image = tables.num_rows - len({row["sha256"] for row in labels})
    if not labels:
        raise ImportSourceError(
            f"none of the {tables.num_rows} rows of '{source.name}' names an image of site '{site.name}'"
        )
    merge_rows(
        into / "quarantine.parquet",
        [
            dict(
                site=site.name,
                source=source.name,
                file=p,
                sha256=None,
                reason="not_a_table_of_this_source",
                detail="",
                size_bytes=None,
            )
            for p in others
        ],
        QUARANTINE,
        ["site", "file", "reason"],
    )
    _store_labels(into, site, labels, report)
    report.quarantined += Counter()  # drop zero counts
    report.check()
    return report
