"""What every stage reads: the parameters in force and the labelled, split, scaled cells of the workspace."""

from pathlib import Path

import pandas as pd

from smearline import dataset, settings
from smearline.recognition import scale_of

SPLITS = Path("splits.parquet")
OVERLAY = Path("tune/overlay.yaml")
TRAINED = Path("models/trained")
MODEL = Path("models/recogniser")
WEIGHTS = Path("models/recogniser.safetensors")
EVALUATION = Path("evaluation")


def in_force() -> settings.Settings:
    """params.yaml with what tuning found put over it."""
    return settings.load(overlay=OVERLAY)


def split_cells(params: settings.Settings) -> pd.DataFrame:
    """`dataset.labelled_index` with `split` and `scale` (um/px, the site's fallback where none is known)."""
    frame = dataset.labelled_index(params.data.folder)
    frame = frame.merge(pd.read_parquet(SPLITS, columns=["sha256", "split"]), on="sha256", validate="one_to_one")
    frame["scale"] = [scale_of(s, m)[0] for s, m in zip(frame["site"], frame["microns_per_px"], strict=True)]
    return frame
