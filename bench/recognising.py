"""Batch recognition (`smearline recognise`, a Ray Data job) beside ONNX Runtime alone, on the same images in the same run.

    python -m bench.recognising WORKSPACE [--images 4000]      (a workspace with a package, such as .work/real)

The images are laid into shards of 500, so that the workers end together; on a large set a worker waits for a shard at most.
Rounds are interleaved and the median counts. Ray and its workers start anew each time; `the job at work` is the job less what the
same job takes for two shards of 32 images, which is its start.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from bench import results
from pipelines.recognise import recognise
from smearline import dataset
from smearline.recognition import RecognitionModel, scale_of

ROUNDS, BATCH, SHARD, CORES = 3, 32, 500, os.cpu_count() or 1
OUTPUTS = ("type_probabilities", "characteristic_probabilities", "embedding")


def lay_out(data: Path, num: int, into: Path, size: int) -> list[tuple[bytes, float]]:
    """`num` images spread over the data set, in shards of `size`; their bytes and scales."""
    index = dataset.index(data, ["sha256"])
    wanted = pa.array(index["sha256"].iloc[np.linspace(0, len(index) - 1, min(num, len(index))).astype(int)])
    found = []
    for shard in dataset.shards(data):
        table = pq.read_table(shard, schema=dataset.CELLS)
        table = table.filter(pa.compute.is_in(table["sha256"], wanted))
        for first in range(0, len(table), size):
            dataset.write_shard(into / "cells", shard.stem.rsplit("-", 1)[0], table.slice(first, size))
        sites, scales = table["site"].to_pylist(), table["microns_per_px"].to_pylist()
        found += [
            (image, scale_of(s, m)[0]) for image, s, m in zip(table["image"].to_pylist(), sites, scales, strict=True)
        ]
    return found


def side_by_side(work: Callable[[int], None]) -> Callable[[], float]:
    """`work` for each core at once, in threads (neither the decoder nor ONNX Runtime holds the interpreter's lock)."""

    def run() -> float:
        started = time.monotonic()
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(work, range(CORES)))
        return time.monotonic() - started

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("workspace", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    given = parser.parse_args()
    package, folder = given.workspace / "package" / "recogniser", Path(tempfile.mkdtemp())
    os.environ.setdefault("SMEARLINE_SITES", str((given.workspace / "sites").resolve()))
    items = lay_out(given.workspace / "data", given.images, folder / "all", SHARD)
    few = len(lay_out(given.workspace / "data", 2 * BATCH, folder / "few", BATCH))
    models = [RecognitionModel(package, threads=1) for _ in range(CORES)]
    crops = np.stack([models[0].prepare(data, scale) for data, scale in items])

    def network(core: int) -> None:
        for first in range(core * BATCH, len(crops), CORES * BATCH):
            models[core].run(crops[first : first + BATCH], *OUTPUTS)

    def network_and_decoder(core: int) -> None:
        for first in range(core * BATCH, len(items), CORES * BATCH):
            batch = [models[core].prepare(data, scale) for data, scale in items[first : first + BATCH]]
            models[core].run(np.stack(batch), *OUTPUTS)

    def job(cells: Path) -> float:
        ray.shutdown()
        shutil.rmtree(folder / "out", ignore_errors=True)
        started = time.monotonic()
        told = recognise(package, cells, folder / "out", workers=CORES)
        assert told["images"] == (few if cells.name == "few" else len(items))
        return time.monotonic() - started

    work: dict[str, Callable[[], float]] = {
        "ONNX Runtime alone, on crops in memory": side_by_side(network),
        "decoder and ONNX Runtime, on bytes in memory": side_by_side(network_and_decoder),
        "the job": lambda: job(folder / "all"),
        "its start": lambda: job(folder / "few"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    try:
        for number in range(ROUNDS):
            for name, run in work.items():
                seconds[name].append(run())
                print(f"round {number + 1}: {name}: {seconds[name][-1]:.1f} s", flush=True)
    finally:
        ray.shutdown()
        shutil.rmtree(folder)
    middle = {name: statistics.median(taken) for name, taken in seconds.items()}
    start = middle.pop("its start")
    rate = {name: len(items) / taken for name, taken in middle.items()}
    rate["the job at work"] = (len(items) - few) / (middle["the job"] - start)
    alone = next(iter(rate.values()))
    told = {
        "images": len(items),
        "workers": CORES,
        "start_seconds": round(start, 1),
        "images_a_second": {name: round(value) for name, value in rate.items()},
        "beside_onnx_runtime_alone": {name: round(value / alone, 2) for name, value in rate.items()},
        "seconds_in_each_round": {name: [round(s, 1) for s in taken] for name, taken in seconds.items()},
    }
    results.write("recognising", told, data=given.workspace / "data")


if __name__ == "__main__":
    main()
