"""JSON as this product writes it: numbers to six places, what is no number as null."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml


def plain(value: Any) -> Any:
    """Plain JSON values of mappings, sequences, numbers (NumPy's too): six places, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return round(float(value), 6) + 0.0 if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def write(path: Path, content: Any) -> None:
    """A file for people and for diffs. Raises ValueError where a number is NaN or infinite: `plain` first."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def shown(content: Any, as_json: bool) -> str:
    """For a terminal: YAML, or JSON where that was asked for."""
    if as_json:
        return json.dumps(content, indent=1)
    said: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)
    return said.rstrip()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
