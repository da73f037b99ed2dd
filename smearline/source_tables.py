"""The tables that lie beside a source's images: read once, joined to files by key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from smearline import vocabulary
from smearline.errors import ImportSourceError
from smearline.sources import Source, Table

Row = dict[str, str]


@dataclass
class SourceTables:
    """All tables of a source under one folder. `files` are their relative paths, blood counts among them."""

    files: set[str] = field(default_factory=set)
    count_files: list[Path] = field(default_factory=list)
    num_rows: int = 0
    _loaded: list[tuple[Table, Mapping[str, str], dict[str, Row]]] = field(default_factory=list)

    @classmethod
    def read(cls, source: Source, root: Path) -> SourceTables:
        """Read every table of the source.

        Raises:
            ImportSourceError: a required table is missing, cannot be read, or lacks its key column.
        """
        found = cls()
        paths = sorted(p for p in root.rglob("*") if p.is_file() and not p.name.startswith("."))
        for table in source.tables:
            pattern = re.compile(rf"(?:^|/){table.file}$")
            matches = [(p, m) for p in paths if (m := pattern.search(p.relative_to(root).as_posix()))]
            if not matches and table.required:
                raise ImportSourceError(
                    f"source '{source.name}' needs a table like '{table.file}' under {root}; none is there"
                )
            for path, match in matches:
                found.files.add(path.relative_to(root).as_posix())
                rows = _read_rows(path, table)
                found.num_rows += len(rows)
                found._loaded.append((table, match.groupdict(), rows))
        if source.counts:
            pattern = re.compile(rf"(?:^|/){source.counts}$")
            found.count_files = [p for p in paths if pattern.search(p.relative_to(root).as_posix())]
            found.files |= {p.relative_to(root).as_posix() for p in found.count_files}
        return found

    def rows_for(self, known: Mapping[str, Any]) -> Iterator[tuple[Table, Row]]:
        """The rows that speak of a file, given what is known of it (path, name, pattern groups, patient)."""
        known = dict(known)
        for table, groups, rows in self._loaded:
            if any(known.get(name) != value for name, value in groups.items() if name in known):
                continue
            key = _key(table.joins.format_map({"patient": "", **known}), table)
            if row := rows.get(key):
                yield table, row
                known |= self.meanings(table, row)

    @staticmethod
    def meanings(table: Table, row: Row) -> dict[str, str]:
        """Column values under the names the importer uses; empty ones are left out."""
        found = {}
        for meaning, columns in table.columns.items():
            for column in (columns,) if isinstance(columns, str) else columns:
                if row.get(column):
                    found[str(meaning)] = row[column]
        return found

    @staticmethod
    def characteristics(row: Row) -> list[tuple[str, str]]:
        """(characteristic, value) for each column so named that is not blank. Raises VocabularyError for a wrong value."""
        words = vocabulary.load()
        return [(n, words.characteristic_value(n, row[n])) for n in words.characteristics if row.get(n)]

    def listed_but_missing(self, present: set[str]) -> list[str]:
        """Paths that a table of files names although they are not there."""
        return sorted(
            key
            for table, _, rows in self._loaded
            if table.per == "file" and table.joins == "{path}"
            for key in rows
            if key not in present
        )


def _read_rows(path: Path, table: Table) -> dict[str, Row]:
    try:
        frame = pd.read_csv(
            path,
            sep=table.separator,
            engine="python" if table.separator != "," else "c",
            header=None if table.header else 0,
            names=list(table.header) if table.header else None,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
        ).fillna("")
    except (ValueError, UnicodeDecodeError) as error:
        raise ImportSourceError(f"{path.name} cannot be read as a table: {error}") from error
    column = next((k for k in table.key if k in frame.columns), None)
    if column is None:
        raise ImportSourceError(
            f"{path.name} has no column {' or '.join(table.key)}; it has {', '.join(frame.columns[:12])}"
        )
    frame = frame.apply(lambda values: values.str.strip())
    return {_key(row[column], table): row for row in frame.to_dict("records")}


def _key(key: str, table: Table) -> str:
    return str(int(key)) if table.numeric_key and key.isdigit() else key
