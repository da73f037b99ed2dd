"""How fast the training reader is: beside the decoder alone on bytes in memory, and beside other loaders on the same work.

    python -m bench.reading DATA [--images 10000] [--rounds 3]      bench/results/reading.json

The work: JPEG bytes to crops of 25 um, 128 x 128, in shuffled batches of 64, with as many processes or threads as there are
cores; every loader calls the same `reader.prepare`. The ceiling is `prepare` on bytes that lie in memory, one process a core.
Rates are of a whole epoch, its start included; the time to the first batch stands beside. WebDataset and MosaicML streaming are
installed beside the bench (.work/peers); what streaming imports and does not use here (torchvision, transformers, clouds) is
replaced by nothing. ImageFolder's package has no CPU build here: `Files` does what it does.
"""

import argparse
import importlib.abc
import importlib.machinery
import io
import logging
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from bench import results
from smearline import dataset, reader, sites

FIELD_UM, SIZE_PX, BATCH = 25.0, 128, 64
CORES = os.cpu_count() or 1
PEERS = Path(__file__).resolve().parents[1] / ".work" / "peers"
PACKAGES = (
    "webdataset",
    "mosaicml-streaming",
    "braceexpand",
    "xxhash",
    "zstd",
    "python-snappy",
    "cramjam",
    "Brotli",
    "catalogue",
)


class _Nothing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that streaming imports and that this work does not touch."""

    roots = ("transformers", "torchvision", "google", "azure", "oci")

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.roots else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        made = MagicMock(name=spec.name)
        made.__path__, made.__spec__, made.__name__ = [], spec, spec.name
        return made

    def exec_module(self, module: Any) -> None:
        pass


def peers() -> None:
    """Make WebDataset and streaming importable."""
    if not (PEERS / "webdataset").exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(PEERS), *PACKAGES]
        subprocess.run(pip, check=True)
    sys.path.append(str(PEERS))
    sys.meta_path.append(_Nothing())


def crop(data: bytes, scale: float) -> np.ndarray:
    return reader.prepare(data, scale, FIELD_UM, SIZE_PX)


class Work:
    """The same images in every layout."""

    def __init__(self, data: Path, num: int, folder: Path) -> None:
        frame = dataset.index(data, ["sha256", "site", "microns_per_px"])
        assumed = {s: sites.load(s).microns_per_px or sites.load(s).assumed_microns_per_px for s in set(frame["site"])}
        frame["scale"] = frame["microns_per_px"].astype(float).fillna(frame["site"].map(assumed).astype(float))
        self.frame = frame.head(num).reset_index(drop=True)
        wanted = set(self.frame["sha256"])
        self.images: dict[str, bytes] = {}
        for block in dataset.iter_rows(data, ["sha256", "image"]):
            self.images |= {s: i for s, i in zip(block["sha256"], block["image"], strict=True) if s in wanted}
        self.items = [
            (s, self.images[s], float(scale))
            for s, scale in zip(self.frame["sha256"], self.frame["scale"], strict=True)
        ]
        self.bytes = sum(len(d) for _, d, _ in self.items)
        self.folder = folder

    def files(self) -> Path:
        out = self.folder / "files"
        for sha256, data, _ in self.items:
            path = out / sha256[:2] / f"{sha256}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return out

    def tars(self) -> list[str]:
        names = []
        for first in range(0, len(self.items), 500):
            names.append(str(self.folder / f"{first:07}.tar"))
            with tarfile.open(names[-1], "w") as tar:
                for sha256, data, scale in self.items[first : first + 500]:
                    for suffix, content in (("jpg", data), ("scale", str(scale).encode())):
                        info = tarfile.TarInfo(f"{sha256}.{suffix}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
        return names

    def mds(self) -> Path:
        from streaming import MDSWriter

        out = self.folder / "mds"
        with MDSWriter(out=str(out), columns={"image": "bytes", "scale": "float64"}) as writer:
            for _, data, scale in self.items:
                writer.write({"image": data, "scale": scale})
        return out

    def parquet(self) -> Path:
        """For Ray Data: its own columns, in files of a size that it likes."""
        out = self.folder / "ray"
        out.mkdir()
        for first in range(0, len(self.items), 1000):
            part = self.items[first : first + 1000]
            pd.DataFrame({"image": [d for _, d, _ in part], "scale": [s for _, _, s in part]}).to_parquet(
                out / f"{first:07}.parquet"
            )
        return out


class Files(Dataset[Any]):
    """As ImageFolder: a file an image."""

    def __init__(self, folder: Path, frame: pd.DataFrame) -> None:
        self.paths = [str(folder / s[:2] / f"{s}.jpg") for s in frame["sha256"]]
        self.scales = frame["scale"].to_list()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(crop(Path(self.paths[i]).read_bytes(), self.scales[i]))


def _from_memory(part: list[tuple[str, bytes, float]], start: Any, done: Any) -> None:
    torch.set_num_threads(1)
    crops = np.empty((BATCH, SIZE_PX, SIZE_PX, 3), np.uint8)
    start.wait()
    for i, (_, data, scale) in enumerate(part):
        crops[i % BATCH] = crop(data, scale)
    done.put(time.monotonic())


def ceiling(work: Work) -> float:
    """Images a second of `prepare` alone, a process a core."""
    fork = multiprocessing.get_context("fork")
    start, done = fork.Event(), fork.Queue()
    processes = [fork.Process(target=_from_memory, args=(work.items[i::CORES], start, done)) for i in range(CORES)]
    for process in processes:
        process.start()
    time.sleep(1.0)
    began = time.monotonic()
    start.set()
    ends = [done.get() for _ in processes]
    for process in processes:
        process.join()
    return len(work.items) / (max(ends) - began)


def timed(batches: Iterator[Any]) -> tuple[float, float]:
    """(images a second of the epoch, seconds to its first batch)."""
    began = time.monotonic()
    num = len(next(batches))
    at_first = time.monotonic()
    num += sum(len(batch) for batch in batches)
    return num / (time.monotonic() - began), at_first - began


def ours(work: Work) -> Callable[[int], Iterator[Any]]:
    crops = reader.Crops(work.frame, FIELD_UM, SIZE_PX, threads=CORES)
    size = len(work.frame) // BATCH * BATCH
    even = np.full(len(work.frame), 1 / len(work.frame))
    return lambda epoch: crops.batches(reader.epoch_order(crops.groups, even, size, 7, epoch), BATCH)


def image_folder(work: Work) -> Callable[[int], Iterator[Any]]:
    files = Files(work.files(), work.frame)
    return lambda _: iter(DataLoader(files, BATCH, shuffle=True, num_workers=CORES))


def web_dataset(work: Work) -> Callable[[int], Iterator[Any]]:
    import webdataset

    names = work.tars()

    def epoch(_: int) -> Iterator[Any]:
        made = webdataset.WebDataset(names, shardshuffle=100, nodesplitter=None).shuffle(1000)
        made = made.to_tuple("jpg", "scale").map(lambda item: torch.from_numpy(crop(item[0], float(item[1]))))
        return iter(DataLoader(made, BATCH, num_workers=CORES))

    return epoch


def mosaicml(work: Work) -> Callable[[int], Iterator[Any]]:
    from streaming import StreamingDataset

    class Cells(StreamingDataset):  # type: ignore[misc, unused-ignore]
        def __getitem__(self, at: Any) -> torch.Tensor:
            item = super().__getitem__(at)
            return torch.from_numpy(crop(item["image"], item["scale"]))

    made = Cells(local=str(work.mds()), shuffle=True, batch_size=BATCH)
    return lambda _: iter(DataLoader(made, BATCH, num_workers=CORES))


def ray_data(work: Work) -> Callable[[int], Iterator[Any]]:
    import ray

    folder = str(work.parquet())

    def prepare(batch: dict[str, Any]) -> dict[str, Any]:
        return {"crop": np.stack([crop(d, s) for d, s in zip(batch["image"], batch["scale"], strict=True)])}

    def epoch(_: int) -> Iterator[Any]:
        """Ray is started before the clock, and ended after: its processes would take from the others."""
        ray.init(num_cpus=CORES, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        made = ray.data.read_parquet(folder).map_batches(prepare, batch_size=BATCH)

        def batches() -> Iterator[Any]:
            yield from (b["crop"] for b in made.iter_batches(batch_size=BATCH, local_shuffle_buffer_size=1000))
            ray.shutdown()

        return batches()

    return epoch


LOADERS = {
    "smearline": ours,
    "ImageFolder with DataLoader": image_folder,
    "WebDataset": web_dataset,
    "MosaicML streaming": mosaicml,
    "Ray Data": ray_data,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=10_000, help="a setting")
    parser.add_argument("--rounds", type=int, default=3, help="a setting")
    given = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    torch.set_num_threads(1)
    peers()
    with tempfile.TemporaryDirectory() as folder:
        work = Work(given.data, given.images, Path(folder))
        loaders = {name: make(work) for name, make in LOADERS.items()}
        rates: dict[str, list[float]] = {name: [] for name in ("ceiling", *loaders)}
        firsts: dict[str, list[float]] = {name: [] for name in loaders}
        for number in range(given.rounds):
            rates["ceiling"].append(ceiling(work))
            for name, epoch in loaders.items():
                rate, first = timed(epoch(number))
                rates[name].append(rate)
                firsts[name].append(first)
                print(f"round {number + 1}: {name} {rate:.0f}/s, first batch after {first:.2f} s", flush=True)
        top = median(rates["ceiling"])
        rows = {
            name: {
                "images_per_second": round(median(found), 1),
                "of_the_ceiling": round(median(found) / top, 3),
                "of_the_ceiling_in_each_round": [round(r / c, 3) for r, c in zip(found, rates["ceiling"], strict=True)],
            }
            | ({"seconds_to_first_batch": round(median(firsts[name]), 2)} if name in firsts else {})
            for name, found in rates.items()
        }
        what = {"images": len(work.items), "bytes_per_image": round(work.bytes / len(work.items)), "crop_px": SIZE_PX}
        results.write("reading", {**what, "cores": CORES, "loaders": rows}, given.data)


if __name__ == "__main__":
    main()
