"""Batch recognition: the packaged recogniser over a whole data set, as a Ray Data job (`smearline recognise`).

    smearline recognise --model package/recogniser --cells data --out recognised [--workers 2]

On this machine, or on the cluster at $RAY_ADDRESS (where data set, model, OUT and the folder of site files lie under the same paths
on every node). A shard is one piece of work: OUT/SHARD.parquet holds a row a cell, as `recognition.table_of` says, renamed into
place when it is whole. Killed at any moment, the same command does what is left.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data

from pipelines.training import start_ray
from smearline import dataset, sites
from smearline.errors import DataError
from smearline.import_folders import locked
from smearline.recognition import RecognitionModel, nothing, recognised

MODEL_KEY, CELLS_KEY, SCALE_KEY = b"smearline.model", b"smearline.cells", b"smearline.scale"
_ROWS = 8192
"""Written together."""


class RecogniseShard:
    """A worker: the model loaded once, then a shard at a time."""

    def __init__(self, model: str, cells: str, out: str, places: str) -> None:
        os.environ[sites.SITES_VARIABLE] = places  # as the driver's: Ray may have been started elsewhere
        self.model, self.cells, self.out = RecognitionModel(Path(model), threads=1), Path(cells), Path(out)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        shard = Path(str(row["shard"]))
        tables = list(recognised(self.model, self.cells, shards=[shard], threads=1))
        if tables:  # else every image of the shard is deleted
            about = {MODEL_KEY: self.model.version, CELLS_KEY: str(self.cells), SCALE_KEY: _scale(shard)}
            whole = pa.concat_tables(tables).replace_schema_metadata(about)
            dataset.write_table(whole, self.out / shard.name, compression="zstd", row_group_size=_ROWS)
        return {"images": sum(map(len, tables))}


def _scale(shard: Path) -> str:
    """What the file of a shard's site says of the scale."""
    site = sites.load(shard.stem.rsplit("-", 1)[0])
    return f"{site.microns_per_px} {site.assumed_microns_per_px}"


def recognise(
    model: Path,
    cells: Path,
    out: Path,
    *,
    workers: int,
    gpus: float = 0,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, Any]:
    """Recognise what is not recognised yet.

    Args:
        workers: processes, each with one CPU and `gpus` GPUs.
        progress: called with shards done and shards in all.

    Returns:
        shards and images recognised now, shards there before, seconds.

    Raises:
        DataError: OUT holds answers of another model, of another data set, or of another version of this software.
        ImportSourceError: another job is writing into OUT.
    """
    with locked(out, out / ".lock"):
        loaded, shards = RecognitionModel(model), dataset.shards(cells)
        before, now = sorted(out.glob("[!.]*.parquet")), set(nothing(loaded.card).column_names)
        for path in before:
            schema = pq.read_schema(path)
            told = schema.metadata or {}
            by, of = told.get(MODEL_KEY, b"").decode(), told.get(CELLS_KEY, b"").decode()
            if of not in ("", str(cells.absolute())):
                raise DataError(f"{path} holds cells of another data set ({of}); give another --out, or remove it")
            if by != loaded.version:
                raise DataError(
                    f"{path} was made by another model ({by or 'unknown'}); give another --out, or remove it"
                )
            if odd := sorted(set(schema.names) ^ now):
                told_by = f"it differs in {', '.join(odd)}"
                raise DataError(
                    f"{path} was made by another version of this software ({told_by}); give another --out, or remove it"
                )
        names, gone = {shard.name for shard in shards}, pa.array(dataset.deleted(cells), pa.string())
        for (
            path
        ) in before:  # of a shard that was compacted, with an image that was deleted since, or read at another scale
            if (
                path.name not in names
                or (pq.read_schema(path).metadata or {}).get(SCALE_KEY, b"").decode() != _scale(path)
                or pc.any(pc.is_in(pq.read_table(path, columns=["sha256"])["sha256"], gone)).as_py()
            ):
                path.unlink()
        there = {path.name for path in before if path.exists()}
        todo = [{"shard": str(shard.absolute())} for shard in shards if shard.name not in there]
        done, num, started = len(shards) - len(todo), 0, time.monotonic()
        found = {"shards": len(todo), "there_before": done}
        for row in todo:
            _scale(Path(row["shard"]))  # a site without a file is told before anything starts
        if todo:
            start_ray(workers, 1)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars, context.raise_original_map_exception = False, True
            work = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
                RecogniseShard,  # type: ignore[arg-type]  # Ray's own note says a class will do
                fn_constructor_args=[str(p.absolute()) for p in (model, cells, out, sites.directory())],
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(todo))),
                num_cpus=1,
                num_gpus=gpus or None,
            )
            for row in work.iter_rows():
                done, num = done + 1, num + int(row["images"])
                progress(done, len(shards))
        return {**found, "images": num, "seconds": round(time.monotonic() - started, 1)}
