"""Stage differentials: a row for each smear of the data set."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pipelines.cells import MODEL, in_force
from smearline import dataset
from smearline.differential import differential
from smearline.recognition import RecognitionModel

DIFFERENTIALS = Path("differentials.parquet")


def main() -> None:
    params = in_force()
    if dataset.index(params.data.folder, ["smear"])["smear"].isna().all():
        pd.DataFrame({"site": [], "smear": []}).to_parquet(DIFFERENTIALS, index=False)
        print("no cell of this data set names its smear: no differentials")
        return
    summary = differential(RecognitionModel(MODEL), params.data.folder, DIFFERENTIALS)
    print(f"{len(summary)} smears")


if __name__ == "__main__":
    main()
