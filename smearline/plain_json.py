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


def strict(data: bytes | str) -> Any:
    """JSON of others. Raises ValueError for what is no JSON, too deep, no text or no number in it, or says one name twice in an
    object: of two readings the last would be taken without a word."""
    try:
        found = json.loads(data, object_pairs_hook=_once, parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # a lone surrogate is no text
        return found
    except RecursionError as error:
        raise ValueError(str(error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"'{name[:100]}' stands twice in one object; keep the right one")
        found[name] = value
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
