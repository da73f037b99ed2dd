"""Crops for training, read from the shards by position, and the order in which they are drawn."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from smearline import images, vocabulary
from smearline.dataset import ROW_GROUP
from smearline.errors import DataError

_CACHE_BYTES = 800_000_000


class Crops:
    """Square crops of one physical size, B x S x S x 3 uint8, by position in `frame`.

    Decoded crops are kept up to a limit of memory, so a small data set is decoded once.
    """

    def __init__(self, frame: pd.DataFrame, field_um: float, size_px: int) -> None:
        """`frame`: shard, row, scale (um/px); a row an image."""
        self._places = list(zip(frame["shard"], frame["row"].astype(int), frame["scale"].astype(float), strict=True))
        self._field_um, self._size_px = field_um, size_px
        self._cache: dict[int, images.UInt8Array] = {}
        self._room = _CACHE_BYTES // (3 * size_px**2)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        return np.stack([self._one(int(p)) for p in positions])

    def _one(self, position: int) -> images.UInt8Array:
        if (found := self._cache.get(position)) is not None:
            return found
        shard, row, scale = self._places[position]
        group, offset = divmod(row, ROW_GROUP)
        data = _shard(shard).read_row_group(group, columns=["image"]).column(0)[offset].as_py()
        made = prepare(data, scale, self._field_um, self._size_px)
        if len(self._cache) < self._room:
            self._cache[position] = made
        return made


@lru_cache(maxsize=256)
def _shard(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(Path(path), memory_map=True)


def prepare(data: bytes, microns_per_px: float, field_um: float, size_px: int) -> images.UInt8Array:
    """Image bytes to the crop that the network sees; the one way, in training and in service."""
    return images.crop(images.decode(data), microns_per_px, field_um, size_px)


def targets(
    frame: pd.DataFrame, types: tuple[str, ...], characteristics: dict[str, tuple[str, ...]]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(N x T allowed types, N x K value positions with -1 for no label) of labelled cells."""
    words = vocabulary.load()
    column = {t: i for i, t in enumerate(types)}
    allowed = np.zeros((len(frame), len(types)), bool)
    for row, code in enumerate(frame["true_type"]):
        if code is not None:
            allowed[row, [column[c] for c in words.children(code) if c in column]] = True
    values = np.full((len(frame), len(characteristics)), -1, np.int64)
    for k, (name, known) in enumerate(characteristics.items()):
        position = {v: i for i, v in enumerate(known)}
        values[:, k] = [position.get(v, -1) for v in frame[name]]
    return allowed, values


def trainable(frame: pd.DataFrame, least: int = 10) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The types and the characteristics that these labels can teach.

    A type needs a label of its own (a parent's does not tell its children apart); a characteristic needs two values
    with `least` labels each, and keeps the values that have any.

    Raises:
        DataError: fewer than two types are labelled.
    """
    words = vocabulary.load()
    types = tuple(t for t in words.types if (frame["true_type"] == t).any())
    if len(types) < 2:
        raise DataError(f"training needs cells of two types at least; labelled here: {', '.join(types) or 'none'}")
    found = {}
    for name, characteristic in words.characteristics.items():
        counts = frame[name].value_counts()
        if sum(counts.get(v, 0) >= least for v in characteristic.values) >= 2:
            found[name] = tuple(v for v in characteristic.values if counts.get(v, 0))
    return types, found


def drawing_weights(frame: pd.DataFrame, balance: float) -> NDArray[np.float64]:
    """The chance of each image: in proportion to (number of its site and type) ** -balance; sums to 1."""
    strata = frame["site"] + "/" + frame["true_type"].astype(object).where(frame["true_type"].notna(), "")
    counts = strata.map(strata.value_counts()).to_numpy(float)
    weights = counts**-balance
    return weights / weights.sum()


def epoch_order(weights: NDArray[np.float64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """`size` positions for one epoch: systematic sampling (each image floor or ceil of its expected count), shuffled.

    Depends on seed and epoch alone, never on workers or ranks.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(weights))
    steps = (np.cumsum(weights[order]) * size + random.random()).astype(np.int64)
    repeats = np.diff(steps, prepend=0)
    drawn = np.repeat(order, repeats)
    short = size - len(drawn)
    drawn = np.concatenate([drawn, order[:short]]) if short > 0 else drawn[:size]
    return random.permutation(drawn)
