"""Stage reference: what each site's smears look like to the packaged recogniser, before any drift.

reference/smears.parquet    a row a smear (monitoring.smears)
reference/centres.parquet   a row a site and predicted type: what cells of the type are like
reference/reference.json    version, origin, and by site what can be judged
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from monitoring import drift
from monitoring.smears import PSEUDO_CELLS, Centres, by_smear, named
from smearline import plain_json
from smearline.errors import DataError

REFERENCE = Path("reference")
_MOST_SMEARS = 2000
"""Of a site with more a random part is kept: more would make no threshold surer."""


@dataclass(frozen=True)
class Reference:
    """What a window is judged against."""

    smears: pd.DataFrame
    centres: dict[str, Centres]
    """By site; a site without cells that training never saw has none."""
    about: dict[str, Any]
    """reference.json."""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Raises DataError: the folder has no reference."""
        if not (folder / "reference.json").is_file():
            raise DataError(f"{folder} holds no reference.json: there is no reference; make one: dvc repro reference")
        about = plain_json.read(folder / "reference.json")
        centres = {}
        for site, rows in pd.read_parquet(folder / "centres.parquet").groupby("site", sort=True):
            total = np.stack(list(rows["total"])).astype(float)
            spread = about["sites"][site]["spread"]
            centres[str(site)] = Centres(tuple(rows["type"]), rows["num"].to_numpy(float), total, spread)
        return cls(pd.read_parquet(folder / "smears.parquet"), centres, about)

    def save(self, folder: Path) -> None:
        rows = [
            {"site": site, "type": t, "num": int(n), "total": list(v)}
            for site, c in self.centres.items()
            for t, n, v in zip(c.types, c.count_T, c.sum_TF, strict=True)
        ]
        folder.mkdir(parents=True, exist_ok=True)
        self.smears.to_parquet(folder / "smears.parquet", index=False)
        pd.DataFrame(rows, columns=["site", "type", "num", "total"]).to_parquet(folder / "centres.parquet", index=False)
        plain_json.write(folder / "reference.json", self.about)


def refer(predictions: pd.DataFrame, pseudo_cells: int = PSEUDO_CELLS, **about: Any) -> Reference:
    """A reference from predictions (predictions.parquet: recognition.recognise with embedding, split and acquired_at).

    Confidence and embedding are measured on the cells that training did not see alone: a recogniser is surer of what it has
    learned by heart. Each day (smear, where days are not known) is compared with the type centres of the others.

    about: version, embedding_version, origin; kept.
    """
    frames, centres, sites = [], {}, {}
    for site, cells in named(predictions, pseudo_cells).groupby("site", sort=True):
        unseen = cells[cells["split"] != "train"]
        if len(unseen):
            centres[str(site)] = Centres.of(unseen)
        blocks = pd.factorize(unseen["day"].where(unseen["day"].notna(), unseen["smear"]))[0]
        parts = [by_smear(cells[cells["split"] == "train"], None), by_smear(unseen, centres.get(str(site)), blocks)]
        smears = pd.concat([p for p in parts if len(p)] or parts[:1], ignore_index=True)
        if len(smears) > _MOST_SMEARS:
            smears = smears.sample(_MOST_SMEARS, random_state=7).sort_index()
        frames.append(smears)
        days = smears["day"].dropna()
        sites[str(site)] = {
            "num_smears": len(smears),
            "num_smears_not_trained_on": int((~smears["seen"].astype(bool)).sum()),
            "num_cells": int(smears["num_cells"].sum()),
            "days": [days.min(), days.max(), days.nunique()] if len(days) else None,
            "pseudo_smears": bool(smears["pseudo"].any()),
            "spread": centres[str(site)].spread if str(site) in centres else None,
        }
    return Reference(pd.concat(frames, ignore_index=True), centres, {**about, "sites": sites})


def main() -> None:
    predictions = pd.read_parquet("predictions.parquet")
    lineage = plain_json.read(Path("package/lineage.json"))
    found = refer(
        predictions,
        version=lineage["version"],
        embedding_version=str(predictions["embedding_version"].iloc[0]),
        origin=lineage["origin"],
    )
    found.save(REFERENCE)
    for site, about in found.about["sites"].items():
        unseen = about["num_smears_not_trained_on"]
        print(f"{site}: {about['num_smears']} smears, {unseen} of them not trained on", end="")
        few = f"; fewer than {drift.LEAST_REFERENCE}: confidence and embedding cannot be judged"
        print(few if unseen < drift.LEAST_REFERENCE else "")


if __name__ == "__main__":
    main()
