"""What one package says of the frozen cells and smears; a process of its own, so that its memory goes when it is done.

python -m flows.score PACKAGE DATA CELLS OUT: OUT/cells.parquet gets sha256 and predicted_type of the cells in CELLS
(Parquet, sha256), OUT/smears.parquet site, smear and group of their smears (none where the package has no diagnosis).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pandas as pd

from smearline import cbc, dataset, diagnosis
from smearline.differential import summarise
from smearline.recognition import RecognitionModel, recognise


def main() -> None:
    package, data, cells, out = map(Path, sys.argv[1:])
    wanted = set(pd.read_parquet(cells, columns=["sha256"])["sha256"])
    model = RecognitionModel(package / "recogniser")
    predictions, vectors = recognise(model, data, keep=wanted)
    unfinished = out.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    predictions[["sha256", "predicted_type"]].to_parquet(unfinished / "cells.parquet", index=False)
    if (package / "diagnosis").is_dir() and predictions["smear"].notna().any():
        summary = summarise(predictions, vectors).assign(embedding_version=model.embedding_version)
        counts = dataset.read_tables(data, "cbc/*.parquet", cbc.COUNTS)
        answers = diagnosis.DiagnosisModel(package / "diagnosis").diagnose(summary, counts)
        answers[["site", "smear", "group"]].astype("string").to_parquet(unfinished / "smears.parquet", index=False)
    unfinished.replace(out)


if __name__ == "__main__":
    main()
