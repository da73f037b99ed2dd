"""How a diagnosis is told: its features in words and units, the reasons that moved it, and answers as a table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from smearline import cbc, vocabulary
from smearline.errors import DataError

NUM_REASONS = 6


def reasons_for(row: pd.Series, usual: pd.Series, shapley: NDArray[np.float64], group: str) -> list[dict[str, Any]]:
    """The features that moved the answer most; the embedding's values count as one.

    Args:
        row, usual: the smear's features, and their medians among the training smears. shapley: of each, for this group.
    """
    pooled = np.array([name.startswith("embedding_") for name in row.index])
    entries = [(str(name), float(shapley[j])) for j, name in enumerate(row.index) if not pooled[j]]
    if pooled.any():
        entries.append(("embedding", float(shapley[pooled].sum())))
    name_of = vocabulary.load().names
    reasons: list[dict[str, Any]] = []
    for name, weight in sorted(entries, key=lambda e: -abs(e[1]))[:NUM_REASONS]:
        if abs(weight) < 1e-9:
            continue
        value, median, what = None, None, "the look of the cells as a whole"
        if name != "embedding":
            say = Told(name)
            value, median = say.plain(row[name]), say.plain(usual[name])
            what = f"{say.name}: {say.value(row[name])} (median of the learned {say.value(usual[name])})"
        says = f"{what} speaks {'for' if weight > 0 else 'against'} {name_of[group]}"
        reasons.append(dict(feature=name, value=value, usual=median, contribution=weight, says=says))
    return reasons


def write_answers(answers: pd.DataFrame, out: Path) -> None:
    """Answers of `DiagnosisModel.diagnose` as .parquet, .csv or .json; in a table, lists stand as JSON.

    Raises:
        DataError: `out` has another suffix.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".json":
        answers.to_json(out, orient="records", indent=1)
        return
    if out.suffix not in (".parquet", ".csv"):
        raise DataError(f"{out.name}: give a name that ends in .parquet, .csv or .json")
    lists = ["reasons", "abstained_because", "cautions", "not_available"]
    flat = answers.assign(**{name: answers[name].map(json.dumps) for name in lists})
    if out.suffix == ".csv":
        flat.to_csv(out, index=False)
    else:
        flat.to_parquet(out, index=False)


class Told:
    """How a feature is told to a reader."""

    def __init__(self, column: str) -> None:
        words = vocabulary.load()
        self._kind, rest = column.split("_", 1)
        self._unit, self._log = "%", False
        if self._kind == "share":
            self.name = f"share of {words.names[rest]}"
        elif self._kind == "rate":
            name = next(n for n in sorted(words.characteristics, key=len, reverse=True) if rest.startswith(f"{n}_"))
            self.name = f"{name.replace('_', ' ')} '{rest[len(name) + 1 :]}'"
        else:
            analyte = cbc.analytes()[rest]
            self.name, self._unit, self._log = f"{analyte.name} ({rest})", analyte.unit, analyte.scale == "log"

    def plain(self, value: float) -> float | None:
        """The value as it was measured, from the model's scale."""
        if np.isnan(value):
            return None
        if self._kind == "share":
            return round(100 * max(value, 0.0) ** 2, 2)
        if self._kind == "rate":
            return round(100 * float(value), 2)
        return round(10**value - 1 if self._log else float(value), 4)

    def value(self, value: float) -> str:
        plain = self.plain(value)
        return "missing" if plain is None else f"{plain:.4g} {self._unit}"
