"""From nothing to the first batch of training, in a workspace: `python -m bench.first_batch` (bench/scale.py runs it)."""

import json
import os
import time
from itertools import islice

from pipelines.cells import split_cells
from smearline import reader, settings

BATCHES = 200


def main() -> None:
    params, started = settings.load(), time.monotonic()
    told: dict[str, float] = {}

    def said(what: str) -> None:
        told[what] = round(time.monotonic() - started - sum(told.values()), 2)

    frame = split_cells(params)
    frame = frame[(frame["split"] == "train") & frame["true_type"].notna()].reset_index(drop=True)
    said("labels, split and places of the images")
    crops = reader.Crops(frame, params.image.field_um, params.image.size_px, threads=os.cpu_count() or 1)
    weights = reader.drawing_weights(frame, 0.5)
    order = reader.epoch_order(crops.groups, weights, len(frame) // 512 * 512, 1, 0)
    said("the order of an epoch")
    batches = crops.batches(order, 64)
    next(batches)
    said("the first batch")
    drawn = sum(len(batch) for batch in islice(batches, BATCHES))
    said("more batches")
    print(json.dumps({"seconds": told, "images_a_second": round(drawn / told["more batches"]), "images": len(frame)}))


if __name__ == "__main__":
    main()
