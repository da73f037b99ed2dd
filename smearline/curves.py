"""Curves that were measured in a workspace beside the pipeline, and stand on its evaluation page.

Each says by which recipe and on which labelled cells it was measured (`recipe`, recognition.recipe_of), so that the page can say
where they are not those of the model that it judges.
"""

import os
from pathlib import Path
from typing import Any

from smearline import plain_json
from smearline.errors import DataError

FOLDER = Path("curves")
"""Of a workspace."""
LEARNING = "learning_curve.json"
_ADAPTATION = "adaptation-"
_HAS = {
    LEARNING: {"recipe", "validation_cells", "epochs", "points", "expected"},
    _ADAPTATION: {"recipe", "rows"},
}
_ROW = {
    LEARNING: {"share", "seed", "cells", "patients", "val_accuracy", "val_balanced_accuracy"},
    _ADAPTATION: {"where", "model", "labels", "cells", "patients", "accuracy", "balanced_accuracy"},
}


def leave(folder: Path, name: str, **content: Any) -> Path:
    """Write a curve, whole or not at all. `name`: `LEARNING`, or what a new site's adaptation is called."""
    path = folder / (name if name == LEARNING else f"{_ADAPTATION}{name}.json")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    plain_json.write(unfinished, plain_json.plain(content))
    return unfinished.replace(path)


def read(folder: Path) -> dict[str, Any]:
    """`learning` (None where none was measured) and `adaptation` (name to curve).

    Raises:
        DataError: a file is none that this version wrote.
    """
    learning = folder / LEARNING
    named = {f.stem.removeprefix(_ADAPTATION): f for f in sorted(folder.glob(f"{_ADAPTATION}*.json"))}
    return {
        "learning": _read(learning, LEARNING) if learning.is_file() else None,
        "adaptation": {name: _read(file, _ADAPTATION) for name, file in named.items()},
    }


def _read(path: Path, kind: str) -> Any:
    try:
        found = plain_json.read(path)
        rows = found.get("points") or found.get("rows")
        known = bool(rows) and set(found) == _HAS[kind] and all(set(row) == _ROW[kind] for row in rows)
    except (ValueError, AttributeError, TypeError):  # no JSON, no object, no rows
        known = False
    if not known:
        raise DataError(f"{path} is no curve of this version: measure it again, or remove it")
    return found
