"""The vocabulary: cell types, their parents, the morphological characteristics and the diagnoses.

All of it is data (the YAML files beside this module); a 15th type or a 25th characteristic changes those files alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from smearline.errors import VocabularyError, nearest


@dataclass(frozen=True)
class CellType:
    name: str
    neighbours: tuple[str, ...]
    outside: bool
    """True for what is recognised but lies outside the 14 types (platelets, smudge cells, artefacts)."""


@dataclass(frozen=True)
class Characteristic:
    name: str
    values: tuple[str, ...]
    applies_to: tuple[str, ...]
    origin: str
    readers: Mapping[str, float | None]
    """How often two readers agreed (`agreement`), and Cohen's `kappa`; None where that is not published."""


@dataclass(frozen=True)
class Vocabulary:
    version: str
    types: Mapping[str, CellType]
    parents: Mapping[str, tuple[str, ...]]
    characteristics: Mapping[str, Characteristic]
    diagnoses: tuple[str, ...]
    names: Mapping[str, str]
    """Code of a type, parent or diagnosis to the name a reader knows."""
    aliases: Mapping[str, str]
    diagnosis_aliases: Mapping[str, str]

    @property
    def differential_types(self) -> tuple[str, ...]:
        """The 14 types of a differential."""
        return tuple(c for c, t in self.types.items() if not t.outside)

    def children(self, code: str) -> tuple[str, ...]:
        """The types for which a label stands: itself, or the children of a parent."""
        if code in self.types:
            return (code,)
        if code in self.parents:
            return self.parents[code]
        raise VocabularyError(f"'{code}' is no cell type; nearest: {nearest(code, [*self.types, *self.parents])}")

    def type_code(self, name: str) -> str:
        """The code for a code or an alias (case, spaces and underscores do not matter).

        Raises:
            VocabularyError: the name is not known; the message gives the nearest known ones.
        """
        code = self.aliases.get(_plain(name))
        if code is None:
            raise VocabularyError(
                f"class '{name}' is not in the vocabulary ({self.version}); nearest: {nearest(name, self.aliases)}. "
                "Map it in the source's YAML under 'classes', or with --map for the source 'folder'."
            )
        return code

    def diagnosis_code(self, name: str) -> str:
        """The code for a diagnosis by code or alias. Raises VocabularyError where it is not known."""
        code = self.diagnosis_aliases.get(_plain(name))
        if code is None:
            raise VocabularyError(f"diagnosis '{name}' is not known; nearest: {nearest(name, self.diagnosis_aliases)}")
        return code

    def characteristic_value(self, name: str, value: str) -> str:
        """A value checked against its characteristic. Raises VocabularyError where either is not known."""
        found = self.characteristics.get(name)
        if found is None:
            raise VocabularyError(f"'{name}' is no characteristic; nearest: {nearest(name, self.characteristics)}")
        if value not in found.values:
            raise VocabularyError(f"'{value}' is no value of {name}; known: {', '.join(found.values)}")
        return value


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()


@cache
def read(name: str) -> dict[str, Any]:
    """A YAML file beside this module."""
    return dict(yaml.safe_load(files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")))


@cache
def load() -> Vocabulary:
    """The vocabulary of this installation, read once."""
    types, chars, diagnoses = read("types"), read("characteristics"), read("diagnoses")
    rows = {**types["types"], **types["outside"]}
    named = {**rows, **types["parents"]}
    unread = {"agreement": None, "kappa": None}
    return Vocabulary(
        version="+".join(part["version"] for part in (types, chars, diagnoses)),
        types={c: CellType(r["name"], tuple(r["neighbours"]), c in types["outside"]) for c, r in rows.items()},
        parents={c: tuple(r["children"]) for c, r in types["parents"].items()},
        characteristics={
            n: Characteristic(
                n, tuple(r["values"]), tuple(r["applies_to"]), r["origin"], chars["reader_agreement"].get(n, unread)
            )
            for n, r in chars["characteristics"].items()
        },
        diagnoses=tuple(diagnoses["diagnoses"]),
        names={c: r["name"] for c, r in {**named, **diagnoses["diagnoses"]}.items()},
        aliases=_aliases(named),
        diagnosis_aliases=_aliases(diagnoses["diagnoses"]),
    )


def _aliases(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for code, row in rows.items():
        for name in (code, row["name"], *row["aliases"]):
            if found.setdefault(_plain(name), code) != code:
                raise VocabularyError(f"the alias '{name}' stands for both {found[_plain(name)]} and {code}")
    return found
