"""Sources: the layout of a data set as its owner publishes it, described in one YAML file each.

A source says by regular expression where class, patient and smear stand in a path, which tables lie beside the
images and what their columns mean, and how its class names map onto the vocabulary. `docs/sources.md` writes one
step by step.
"""

import re
from importlib.resources import files
from typing import Literal

import yaml
from pydantic import BaseModel, ValidationError, field_validator

from smearline import vocabulary
from smearline.errors import ImportSourceError, nearest

Meaning = Literal[
    "class", "patient", "smear", "acquired_at", "microns_per_px", "diagnosis", "age", "sex", "reannotation_1",
    "reannotation_2",
]  # fmt: skip


class Table(BaseModel, frozen=True, extra="forbid"):
    """A table beside the images, joined to files by a key made of the groups of the path's pattern."""

    file: str  # regular expression for the table's path; a group that the images' pattern has too must agree with it
    key: tuple[str, ...]  # the table's key column; the first of these that it has
    joins: str  # the key of a file, as a template over `path`, `name` and the pattern's groups, or over `patient`
    numeric_key: bool = False  # whether 7, 07 and 007 are the same key
    columns: dict[Meaning, str | tuple[str, ...]] = {}  # meaning to column (or its other names), if the table has it
    header: tuple[str, ...] | None = None  # column names where the file has none
    separator: str = ","
    blank: tuple[str, ...] = ()  # what stands for nothing
    ignore: tuple[str, ...] = ()  # columns (in lower case) known not to be needed; other unused ones are reported
    required: bool = True
    characteristics: bool = False  # whether columns named like a characteristic are labels of it


class Source(BaseModel, frozen=True, extra="forbid"):
    """One layout."""

    name: str
    describe: str
    images: Literal["files", "imported"] = "files"
    """'imported': the source brings labels alone, for images of the same site that are in the data set already."""
    pattern: str
    """Regular expression for the end of an image's path; groups: class, patient, smear, and any that templates use."""
    patient_from: str | None = None
    smear_from: str | None = None
    microns_per_px: float | None = None  # as the owner states it; must agree with the site's file
    classes: dict[str, str | None] | None = None  # name to code, or to null: no label. None: the vocabulary's own names
    labelled_by: str
    tables: tuple[Table, ...] = ()
    counts: str | None = None  # regular expression for blood-count exports lying beside the images

    @field_validator("classes")
    @classmethod
    def _known_codes(cls, classes: dict[str, str | None] | None) -> dict[str, str | None] | None:
        for code in filter(None, (classes or {}).values()):
            vocabulary.load().children(code)
        return classes

    def type_code(self, label: str) -> str | None:
        """The code of a class name of this source; None where it is known to say nothing.

        Raises:
            ImportSourceError, VocabularyError: the name is not mapped; the message gives the nearest known ones.
        """
        if self.classes is None:
            return vocabulary.load().type_code(label)
        if label not in self.classes:
            raise ImportSourceError(
                f"source '{self.name}' does not map the class '{label}'; nearest it knows: {nearest(label, self.classes)}. "
                f"Nothing was imported. Map it in smearline/sources/{self.name}.yaml under 'classes'."
            )
        return self.classes[label]


def at_end(pattern: str) -> re.Pattern[str]:
    """What finds a source's pattern at the end of a relative path."""
    return re.compile(rf"(?:^|/){pattern}$", re.IGNORECASE)


def names() -> list[str]:
    """The sources of this installation."""
    return sorted(p.name.removesuffix(".yaml") for p in files(__package__).iterdir() if p.name.endswith(".yaml"))


def load(name: str, classes: dict[str, str | None] | None = None) -> Source:
    """The source's description; `classes` replaces its class map.

    Raises:
        ImportSourceError: there is no such source, or its file is not valid.
    """
    if name not in names():
        raise ImportSourceError(f"no source '{name}'; known: {', '.join(names())}; nearest: {nearest(name, names())}")
    raw = yaml.safe_load(files(__package__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    try:
        return Source.model_validate({**raw, "name": name} | ({"classes": classes} if classes else {}))
    except ValidationError as error:
        raise ImportSourceError(f"source '{name}': {error}") from error
