"""Cells as the recogniser and the log describe them, drawn from random numbers: smears differ, and so do cells."""

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from monitoring.reference import Reference, refer
from smearline import vocabulary
from smearline.staining import FEATURES

USUAL = {"NEUT_SEG": 0.5, "LYMPH": 0.25, "MONO": 0.1, "EOS": 0.05, "BLAST": 0.05, "UNIDENTIFIED": 0.05}
WARD = {"NEUT_SEG": 0.2, "LYMPH": 0.1, "MONO": 0.05, "BLAST": 0.6, "UNIDENTIFIED": 0.05}
LEVEL = {"stain_glass": 220.0, "stain_red_cell": 0.13, "stain_nucleus": 0.6, "optics_sharpness": 1.4}


def draw(
    num_smears: int,
    seed: int,
    *,
    site: str = "lab",
    mix: dict[str, float] = USUAL,
    per_day: int = 4,
    first_day: str = "2024-03-04",
    cells: int = 40,
    **changes: float,
) -> pd.DataFrame:
    """`changes`: factor on every feature whose name begins so; `confidence` and `embedding` are added to."""
    random, types = np.random.default_rng(seed), list(vocabulary.load().types)
    centres = np.random.default_rng(0).normal(size=(len(types), 8))
    frames = []
    for number in range(num_smears):
        shares = random.dirichlet(np.array(list(mix.values())) * 40)
        codes = np.array([types.index(t) for t in random.choice(list(mix), size=cells, p=shares)])
        frame = {"predicted_type": [types[c] for c in codes]}
        for name in FEATURES:
            level = next((v for k, v in LEVEL.items() if name.startswith(k)), 0.5)
            factor = float(np.prod([f for k, f in changes.items() if name.startswith(k)]))
            own = 0.3 if "nucleus" in name and mix is WARD else 0.0  # blasts stain paler than neutrophils do
            paler = np.where(codes == types.index("BLAST"), 1 - own, 1.0)
            smear = level * factor * (1 + random.normal() * 0.03)
            frame[name] = (smear * paler * (1 + random.normal(size=cells) * 0.1)).astype(np.float32)
        sure = (
            0.9
            - 0.2 * (codes == types.index("BLAST"))
            + changes.get("confidence", 0.0)
            + random.normal(size=cells) * 0.05
        )
        rest = (1 - np.clip(sure, 0.1, 0.99)) / (len(types) - 1)
        for i, t in enumerate(types):
            frame[f"p_{t}"] = np.where(codes == i, np.clip(sure, 0.1, 0.99), rest).astype(np.float32)
        vectors = centres[codes] + random.normal(size=(cells, 8)) * 0.3 + changes.get("embedding", 0.0)
        frame["embedding"] = list(vectors.astype(np.float32))
        day = pd.Timestamp(first_day, tz="UTC") + pd.Timedelta(days=number // per_day)
        frame |= {"site": site, "smear": f"s{seed}-{number}", "patient": f"p{seed}-{number}", "acquired_at": day}
        frame["sha256"] = [hashlib.sha256(f"{site}/{seed}/{number}/{i}".encode()).hexdigest() for i in range(cells)]
        frames.append(pd.DataFrame(frame))
    return pd.concat(frames, ignore_index=True).assign(scale_assumed=False, split="test")


@cache
def lab() -> Reference:
    """24 smears of 'lab', over six days, none of them trained on."""
    return refer(draw(24, 1), version="v1", embedding_version="e1", origin="simulated")


def write_log(folder: Path, cells: pd.DataFrame, version: str = "v1") -> Path:
    """Cells as the case store exports them: FOLDER/SITE/DAY.parquet."""
    cells = cells.assign(version=version, day=cells["acquired_at"].dt.strftime("%Y-%m-%d")).drop(columns="split")
    for (site, day), part in cells.groupby(["site", "day"]):
        path = folder / str(site) / f"{day}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        part.to_parquet(path, index=False)
    return folder
