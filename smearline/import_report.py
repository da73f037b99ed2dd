"""What became of the files of an import."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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
    relabelled: int = 0
    other_identity: int = 0
    ignored_columns: list[str] = field(default_factory=list)

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
                *([f"labels corrected: {self.relabelled}"] if self.relabelled else []),
                *(
                    [f"columns that mean nothing here: {', '.join(self.ignored_columns)}"]
                    if self.ignored_columns
                    else []
                ),
                *([f"blood counts: {self.count_values} values"] if self.count_values else []),
            ]
        )
