"""Near duplicates on real images: are re-exports found, and how often are two different cells called one?

    python -m bench.near_duplicates DATA_SET      (a data set that `make real` or `smearline import` has made)

Recall: 500 images exported again (JPEG quality, pixels of shift, resize) against their originals. False alarms: pairs of
images of one site at least as alike as the threshold; of JHU only pairs of different patients, which cannot be one cell.
BCCD holds true re-photographs of one cell, so its pairs are counted apart and were looked at one by one.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
from PIL import Image

from bench.results import write
from smearline import dataset, duplicates, images


def reexport(pixels: images.UInt8Array, quality: int, shift: int, resize: float) -> images.UInt8Array:
    picture = Image.fromarray(pixels).crop((shift, shift, pixels.shape[1], pixels.shape[0]))
    picture = picture.resize((round(picture.width * resize), round(picture.height * resize)))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return images.decode(out.getvalue())


CHANGES = {
    "JPEG quality 50": (50, 0, 1.0),
    "1 px of shift": (95, 1, 1.0),
    "2 px of shift": (95, 2, 1.0),
    "4 px of shift": (95, 4, 1.0),
    "resize to 0.90": (90, 0, 0.9),
    "quality 70, 1 px of shift, resize to 1.05": (70, 1, 1.05),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data
    frame = dataset.index(data, ["sha256", "site", "patient", "thumbnail"])
    started = time.perf_counter()
    found = duplicates.pairs(list(frame["thumbnail"]))
    seconds = time.perf_counter() - started
    site, patient = frame["site"].to_numpy(), frame["patient"].to_numpy()
    vectors = duplicates.unit_vectors(list(frame["thumbnail"]))
    by_site = {}
    for name in sorted(frame["site"].unique()):
        rows = np.flatnonzero(site == name)
        likeness = np.triu(vectors[rows] @ vectors[rows].T, k=1)
        if any(patient[rows]):
            likeness[patient[rows][:, None] == patient[rows][None, :]] = 0
        comparable = int((likeness != 0).sum())
        inside = [
            k
            for k, (a, b) in enumerate(found)
            if site[a] == site[b] == name and (patient[a] is None or patient[a] != patient[b])
        ]
        by_site[name] = {
            "pairs_compared": comparable,
            "pairs_called_duplicates": len(inside),
            "highest_correlation": round(float(likeness.max()), 4),
        }
    chosen = set(frame["sha256"].iloc[np.random.default_rng(7).choice(len(frame), min(500, len(frame)), replace=False)])
    hits: dict[str, list[bool]] = {name: [] for name in CHANGES}
    for block in dataset.iter_rows(data, ["sha256", "image"]):
        for sha256, raw in zip(block["sha256"], block["image"], strict=True):
            if sha256 in chosen:
                pixels = images.decode(raw)
                for name, change in CHANGES.items():
                    both = [images.thumbnail(pixels).tobytes(), images.thumbnail(reexport(pixels, *change)).tobytes()]
                    hits[name].append(len(duplicates.pairs(both)) == 1)
    write(
        "near_duplicates",
        {
            "threshold": duplicates.MIN_CORRELATION,
            "images": len(frame),
            "search_seconds": round(seconds, 2),
            "recall_of_reexports": {name: round(float(np.mean(h)), 4) for name, h in hits.items()},
            "by_site": by_site,
        },
        data,
    )


if __name__ == "__main__":
    main()
