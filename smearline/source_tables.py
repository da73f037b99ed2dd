"""What a source says of a file: by its path, and in the tables that lie beside the images, read once and joined by key."""

import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa

from smearline import vocabulary
from smearline.errors import ImportSourceError
from smearline.sources import Meaning, Source, Table, at_end

Row = dict[str, str]
"""What a row says, by meaning and by characteristic. Blank values are left out, but for a blank class, which says that
the file has no label."""
MEANINGS: tuple[str, ...] = get_args(Meaning)


@dataclass(frozen=True)
class Described:
    """An image file and all that its path and the tables say of it."""

    path: str
    fields: Mapping[str, str]  # by meaning, identifiers as they are; `diagnosis_code` is the vocabulary's
    labels: list[dict[str, Any]]  # rows of LABELS, less sha256
    spoken_of: bool  # whether a class, or a row of a table, says anything of it


class _Rows:
    """A table's rows by key, kept in columns: a dictionary a row would take several times the memory."""

    def __init__(self, keys: Sequence[str], columns: Iterable[tuple[str, Iterable[str]]]) -> None:
        hashes = np.fromiter(map(hash, keys), np.int64, len(keys))
        order = np.argsort(hashes, kind="stable")
        self._hashes, self.keys = hashes[order], pa.array(keys, pa.large_string()).take(order)
        self._columns = [
            (meaning, pa.array(values, pa.large_string()).dictionary_encode().take(order))
            for meaning, values in columns
        ]

    def of(self, key: str) -> list[Row]:
        """In the order of the file."""
        first, last = (int(np.searchsorted(self._hashes, hash(key), side)) for side in ("left", "right"))
        found = []
        for place in range(first, last):
            if self.keys[place].as_py() == key:
                said = [(meaning, column[place].as_py()) for meaning, column in self._columns]
                found.append({meaning: value for meaning, value in said if value or meaning == "class"})
        return found


@dataclass(frozen=True)
class _Loaded:
    table: Table
    path: str  # relative to the folder that is imported
    groups: Mapping[str, str]
    rows: _Rows
    used: set[str] = field(default_factory=set)
    """The keys of images, where they are people."""

    @property
    def folder(self) -> str:
        """Where the table lies; paths that it names are relative to there."""
        return self.path[: self.path.rfind("/") + 1]

    @property
    def of_paths(self) -> bool:
        return self.table.joins == "{path}"

    @property
    def of_people(self) -> bool:
        return self.table.joins == "{patient}"


class SourceTables:
    """All tables of a source among `paths`, which are relative to `root`. `files` are theirs, blood counts among them.

    Raises:
        ImportSourceError: a required table is missing, cannot be read, or lacks its key column.
    """

    def __init__(self, source: Source, root: Path, paths: Iterable[str]) -> None:
        self.source, self.root = source, root
        paths = [p for p in paths if not p.rsplit("/", 1)[-1].startswith(".")]
        counts = [p for p in paths if source.counts and at_end(source.counts).search(p)]
        self.count_files = [root / p for p in counts]
        self.ignored_columns: list[str] = []
        self._loaded: list[_Loaded] = []
        for table in source.tables:
            matches = [(p, m) for p in paths if (m := at_end(table.file).search(p))]
            if not matches and table.required:
                raise ImportSourceError(
                    f"source '{source.name}' needs a table like '{table.file}' under {root}; none is there"
                )
            for path, match in matches:
                rows, ignored = _read(root / path, table)
                self.ignored_columns += [f"{path}: {name}" for name in ignored]
                self._loaded.append(_Loaded(table, path, match.groupdict(), rows))
        self.files = {loaded.path for loaded in self._loaded} | set(counts)
        self.num_rows = sum(len(loaded.rows.keys) for loaded in self._loaded)

    def _rows_for(self, known: Mapping[str, str]) -> Iterator[Row]:
        """The rows that speak of a file, given what is known of it (path, name, pattern groups, patient).

        Raises:
            ImportSourceError: two rows say different things of it, other than labels.
        """
        known, path, said = {"patient": "", **known}, known["path"], dict[str, str]()
        for loaded in self._loaded:
            if any(known.get(name) != value for name, value in loaded.groups.items() if name in known):
                continue
            if loaded.of_paths and not path.startswith(loaded.folder):
                continue
            key = _key(loaded.table.joins.format_map({**known, "path": path.removeprefix(loaded.folder)}), loaded.table)
            for row in loaded.rows.of(key):
                for meaning, value in row.items():
                    if meaning in MEANINGS and meaning != "class" and said.setdefault(meaning, value) != value:
                        raise ImportSourceError(
                            f"{loaded.path} says another {meaning} of {path} than was said before it; leave one"
                        )
                known |= row
                yield row
            if loaded.of_people:
                loaded.used.add(key)

    def describe(self, path: str, groups: Mapping[str, str]) -> Described:
        """All that is said of a file, checked against the vocabulary.

        Args:
            groups: of the images' pattern in its path.

        Raises:
            ImportSourceError, VocabularyError: a class, characteristic or diagnosis is not mapped, or said twice.
        """
        source, words = self.source, vocabulary.load()
        known = {"class": "", **groups, "path": path, "name": path.rsplit("/", 1)[-1]}
        templates = {"class": "{class}", "patient": source.patient_from, "smear": source.smear_from}
        fields = {k: t.format_map(known) for k, t in templates.items() if t}
        classes: list[str] = []
        spoken_of = bool(fields.get("class"))
        said: list[tuple[str, str, str, str, str]] = []
        for row in self._rows_for({**known, **fields}):
            fields |= row
            spoken_of = True
            classes += [row["class"]] if "class" in row else []
            traits = [(name, row[name]) for name in words.characteristics if name in row]
            said += [(n, words.characteristic_value(n, v), v, "", "reference") for n, v in traits]
        types = [(label, "", "reference") for label in classes or [fields.get("class", "")]]
        types += [(fields.get(f"reannotation_{n}", ""), f", re-annotation {n}", "reannotation") for n in (1, 2)]
        said += [("type", code, t, by, role) for t, by, role in types if t and (code := source.type_code(t))]
        if fields.get("diagnosis"):
            fields["diagnosis_code"] = words.diagnosis_code(fields["diagnosis"])
        # Whether they are conflicted is worked out when they are merged.
        common = {"vocabulary": words.version, "source": source.name, "conflicted": False}
        labels = [
            {"name": n, "value": v, "source_label": t, "labelled_by": source.labelled_by + by, "role": role} | common
            for n, v, t, by, role in said
        ]
        return Described(path, fields, labels, spoken_of)

    def listed_but_missing(self, present: Iterable[str]) -> list[str]:
        """Paths that a table of files names although they are not there."""
        there = {unicodedata.normalize("NFC", p) for p in present}
        named = {t.folder + key for t in self._loaded if t.of_paths for key in t.rows.keys.to_pylist() if key}
        return sorted(named - there)

    def unused_rows(self) -> int:
        """How many rows of tables of people are of nobody who was described."""
        return sum(key not in t.used for t in self._loaded if t.of_people for key in t.rows.keys.to_pylist() if key)


def _read(path: Path, table: Table) -> tuple[_Rows, list[str]]:
    """Its rows, and the names of the columns that mean nothing here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the heading would be cut
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
    except (ValueError, pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise ImportSourceError(
            f"{path.name} cannot be read as a table (UTF-8, separator '{table.separator}', values that hold it in quotes): {error}"
        ) from error
    frame.columns = [str(name).strip().casefold() for name in frame.columns]
    if twice := sorted(set(frame.columns[frame.columns.duplicated()])):
        raise ImportSourceError(f"{path.name} has the column '{twice[0]}' twice; keep the right one")
    key = next((k.casefold() for k in table.key if k.casefold() in frame.columns), None)
    if key is None:
        raise ImportSourceError(
            f"{path.name} has no column {' or '.join(table.key)}; it has {', '.join(frame.columns[:12])}"
        )
    frame = frame.apply(lambda values: values.str.strip())
    frame = frame.mask(frame.isin(list(table.blank)), "")
    columns = {meaning: [names] if isinstance(names, str) else names for meaning, names in table.columns.items()}
    means: dict[str, str] = {name.casefold(): meaning for meaning, names in columns.items() for name in names}
    means |= {name: name for name in vocabulary.load().characteristics if table.characteristics}
    rows = _Rows([_key(k, table) for k in frame[key]], [(means[c], frame[c]) for c in frame.columns if c in means])
    known = {*means, *table.ignore, *(k.casefold() for k in table.key)}
    return rows, [c for c in frame.columns if c not in known]


def _key(key: str, table: Table) -> str:
    if table.numeric_key and key.isdigit():
        return str(int(key))
    return unicodedata.normalize("NFC", key.replace("\\", "/").removeprefix("./"))
