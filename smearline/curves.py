"""Curves that were measured in a workspace beside the pipeline, and stand on its evaluation page.

Each says on which training cells it was measured (`data_digest`, as in a model's card), so that the page can say where they are not
those of the model that it judges.
"""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from smearline import plain_json
from smearline.errors import DataError

FOLDER = Path("curves")
"""Of a workspace."""
LEARNING = "learning_curve.json"
_ADAPTATION = "adaptation-"


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class _File(_Checked):
    data_digest: str


class _Point(_Checked):
    share: float
    seed: int
    cells: int
    patients: int
    val_accuracy: float
    val_balanced_accuracy: float


class _Law(_Checked):
    exponent: float
    factor: float
    error_at_times_the_cells: dict[str, float]
    largest_miss: float


class _Expected(_Checked):
    val_accuracy: _Law | None
    val_balanced_accuracy: _Law | None


class Learning(_File):
    validation_cells: int
    epochs: int
    points: list[_Point] = Field(min_length=2)
    expected: _Expected


class _Row(_Checked):
    where: Literal["the new site", "home"]
    model: Literal["as it was", "adapted"]
    labels: int
    cells: int
    patients: int
    accuracy: float
    balanced_accuracy: float


class Adaptation(_File):
    rows: list[_Row]

    def model_post_init(self, _: Any) -> None:
        if all(row.model == "as it was" for row in self.rows):
            raise ValueError("no row is of an adapted model")


def leave(folder: Path, name: str, kind: type[_File], **content: Any) -> Path:
    """Write a curve, whole or not at all. `name`: `LEARNING`, or what a new site's adaptation is called."""
    checked = kind.model_validate(plain_json.plain(content)).model_dump(mode="json")
    path = folder / (name if name == LEARNING else f"{_ADAPTATION}{name}.json")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    plain_json.write(unfinished, checked)
    return unfinished.replace(path)


def read(folder: Path) -> dict[str, Any]:
    """`learning` (None where none was measured) and `adaptation` (name to curve).

    Raises:
        DataError: a file is none that this version wrote.
    """
    learning = folder / LEARNING
    named = {f.stem.removeprefix(_ADAPTATION): f for f in sorted(folder.glob(f"{_ADAPTATION}*.json"))}
    return {
        "learning": _read(learning, Learning) if learning.is_file() else None,
        "adaptation": {name: _read(file, Adaptation) for name, file in named.items()},
    }


def _read(path: Path, kind: type[_File]) -> dict[str, Any]:
    try:
        return kind.model_validate(plain_json.read(path)).model_dump(mode="json")
    except ValueError as error:  # JSON's and pydantic's
        why = " ".join(str(error).splitlines()[:3])
        raise DataError(f"{path} is no curve of this version ({why}): measure it again, or remove it") from error
