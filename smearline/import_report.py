"""What an import says of the files that it was given."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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
