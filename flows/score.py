"""Name the frozen cells with one package; a process of its own, so that its memory goes when it is done.

python -m flows.score MODEL DATA CELLS OUT: OUT gets sha256 and predicted_type of the cells in CELLS (Parquet, sha256).
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from smearline.recognition import RecognitionModel, recognise


def main() -> None:
    model, data, cells, out = map(Path, sys.argv[1:])
    wanted = set(pd.read_parquet(cells, columns=["sha256"])["sha256"])
    predictions, _ = recognise(RecognitionModel(model), data, keep=wanted)
    unfinished = out.with_suffix(".unfinished")
    predictions[["sha256", "predicted_type"]].to_parquet(unfinished, index=False)
    unfinished.replace(out)


if __name__ == "__main__":
    main()
