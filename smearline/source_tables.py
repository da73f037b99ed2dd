"""The tables that lie beside a source's images: read once, joined to files by key."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from smearline import vocabulary
from smearline.errors import ImportSourceError
from smearline.sources import Source, Table

Row = dict[str, str]


@dataclass(frozen=True)
class _Loaded:
    table: Table
    path: str
    """Relative to the folder that is imported."""
    groups: Mapping[str, str]
    rows: Mapping[str, list[Row]]

    @property
    def folder(self) -> str:
        """Where the table lies; paths that it names may be relative to there."""
        return self.path[: self.path.rfind("/") + 1]


@dataclass
class SourceTables:
    """All tables of a source under one folder. `files` are their relative paths, blood counts among them."""

    files: set[str] = field(default_factory=set)
    count_files: list[Path] = field(default_factory=list)
    num_rows: int = 0
    ignored_columns: list[str] = field(default_factory=list)
    _loaded: list[_Loaded] = field(default_factory=list)

    @classmethod
    def read(cls, source: Source, root: Path, paths: Iterable[str]) -> SourceTables:
        """Read every table of the source among `paths`, which are relative to `root`.

        Raises:
            ImportSourceError: a required table is missing, cannot be read, lacks its key column, or says two different
                things of one file that is not a label.
        """
        found = cls()
        paths = [p for p in paths if not p.rsplit("/", 1)[-1].startswith(".")]
        for table in source.tables:
            pattern = re.compile(rf"(?:^|/){table.file}$", re.IGNORECASE)
            matches = [(p, m) for p in paths if (m := pattern.search(p))]
            if not matches and table.required:
                raise ImportSourceError(
                    f"source '{source.name}' needs a table like '{table.file}' under {root}; none is there"
                )
            for path, match in matches:
                found.files.add(path)
                rows, ignored = _read_rows(root / path, table)
                found.num_rows += sum(len(r) for r in rows.values())
                found.ignored_columns += [f"{path}: {name}" for name in ignored]
                found._loaded.append(_Loaded(table, path, match.groupdict(), rows))
        if source.counts:
            pattern = re.compile(rf"(?:^|/){source.counts}$", re.IGNORECASE)
            counts = [p for p in paths if pattern.search(p)]
            found.count_files = [root / p for p in counts]
            found.files |= set(counts)
        return found

    def rows_for(self, known: Mapping[str, Any]) -> Iterator[tuple[Table, Row]]:
        """The rows that speak of a file, given what is known of it (path, name, pattern groups, patient).

        Raises:
            ImportSourceError: two rows say different things of it, other than labels.
        """
        known = {"patient": "", **known}
        for loaded in self._loaded:
            if any(known.get(name) != value for name, value in loaded.groups.items() if name in known):
                continue
            path = str(known["path"])
            here = {**known, "path": path.removeprefix(loaded.folder)}
            rows = loaded.rows.get(_key(loaded.table.joins.format_map(here), loaded.table), [])
            for row in rows:
                said = self.meanings(loaded.table, row)
                for meaning, value in said.items():
                    if meaning != "class" and self.meanings(loaded.table, rows[0]).get(meaning) != value:
                        raise ImportSourceError(f"{loaded.path} says two things of the {meaning} of {path}; leave one")
                known |= said
                yield loaded.table, row

    @staticmethod
    def meanings(table: Table, row: Row) -> dict[str, str]:
        """Column values under the names the importer uses. Blank ones are left out, but for a blank class, which says
        that the file has no label."""
        found = {}
        for meaning, columns in table.columns.items():
            for column in (columns,) if isinstance(columns, str) else columns:
                value = row.get(column.casefold())
                if value or (meaning == "class" and value is not None):
                    found[str(meaning)] = value
        return found

    @staticmethod
    def characteristics(row: Row) -> list[tuple[str, str]]:
        """(characteristic, value) for each column so named that is not blank. Raises VocabularyError for a wrong value."""
        words = vocabulary.load()
        return [(n, words.characteristic_value(n, row[n])) for n in words.characteristics if row.get(n)]

    def listed_but_missing(self, present: Iterable[str]) -> list[str]:
        """Paths that a table of files names although they are not there."""
        keys = {unicodedata.normalize("NFC", p) for p in present}
        return sorted(
            loaded.folder + key
            for loaded in self._loaded
            if loaded.table.per == "file" and loaded.table.joins == "{path}"
            for key in loaded.rows
            if loaded.folder + key not in keys
        )


def _read_rows(path: Path, table: Table) -> tuple[dict[str, list[Row]], list[str]]:
    """Rows by key, columns in lower case; and the names of the columns that mean nothing here."""
    try:
        frame = pd.read_csv(
            path,
            sep=table.separator,
            engine="python" if table.separator != "," else "c",
            header=None if table.header else 0,
            names=list(table.header) if table.header else None,
            index_col=False,
            dtype=str,
            keep_default_na=False,
            encoding="utf-8-sig",
        ).fillna("")
    except (ValueError, pd.errors.ParserError) as error:
        raise ImportSourceError(
            f"{path.name} cannot be read as a table (UTF-8, separator '{table.separator}'): {error}"
        ) from error
    frame.columns = [str(name).strip().casefold() for name in frame.columns]
    column = next((k for k in table.key if k.casefold() in frame.columns), None)
    if column is None:
        raise ImportSourceError(
            f"{path.name} has no column {' or '.join(table.key)}; it has {', '.join(frame.columns[:12])}"
        )
    frame = frame.apply(lambda values: values.str.strip())
    frame = frame.mask(frame.isin(list(table.blank)), "")
    rows: dict[str, list[Row]] = defaultdict(list)
    for row in frame.to_dict("records"):
        rows[_key(row[column.casefold()], table)].append(row)
    named = {c.casefold() for names in table.columns.values() for c in ((names,) if isinstance(names, str) else names)}
    named |= {k.casefold() for k in table.key} | (
        set(vocabulary.load().characteristics) if table.characteristics else set()
    )
    return dict(rows), [c for c in frame.columns if c not in named | set(table.ignore)]


def _key(key: str, table: Table) -> str:
    if table.numeric_key and key.isdigit():
        return str(int(key))
    return unicodedata.normalize("NFC", key.replace("\\", "/").removeprefix("./"))
