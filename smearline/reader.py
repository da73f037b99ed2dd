"""Crops for training, read from the shards by whole row groups, and the order in which they are drawn (docs/decisions/009).

The order is a list of positions that hangs on seed and epoch alone: any number of workers takes its part of the same batches, and
a run goes on in mid-epoch by its step. Row groups are fetched by one thread, ahead; crops are decoded on others, into the batch
itself. Pixels stay uint8.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray

from smearline import images, vocabulary
from smearline.dataset import ROW_GROUP
from smearline.errors import DataError

LANES, MIX = 8, 512
_PIECE = 8
"""Images that a thread decodes at a time."""
_AHEAD = 3
"""Batches that are decoded ahead."""

Ints = NDArray[np.int64]


class _Flying(NamedTuple):
    crops: images.UInt8Array
    pieces: list[Future[None]]


class Crops:
    """Square crops of one physical size, S x S x 3 uint8, by position in `frame`."""

    def __init__(self, frame: pd.DataFrame, field_um: float, size_px: int, threads: int = 1) -> None:
        """`frame`: shard, row, scale (um/px); a row an image. threads: that decode, beside the caller's and one that reads."""
        self._names, shard_N = np.unique(frame["shard"].to_numpy(str), return_inverse=True)
        self._row_N = frame["row"].to_numpy(np.int64)
        self._group_N = (shard_N.astype(np.int64) << 32) + self._row_N // ROW_GROUP
        self._scale_N = frame["scale"].to_numpy(float)
        self._field_um, self._size_px = field_um, size_px
        self._decoders, self._fetcher = ThreadPoolExecutor(threads), ThreadPoolExecutor(1)

    @property
    def groups(self) -> Ints:
        """The row group of each image, numbered from 0."""
        return np.unique(self._group_N, return_inverse=True)[1].astype(np.int64)

    def batches(self, positions: Ints, size: int, start: int = 0) -> Iterator[NDArray[np.uint8]]:
        """The crops at these positions, `size` at a time, from batch `start` on; the last may be smaller.

        Memory: the bytes of two stretches of LANES * MIX images, and _AHEAD + 1 batches.
        """
        if start * size >= len(positions):
            return
        stretch = max(size, LANES * MIX // size * size)
        begins = range(start * size, len(positions), stretch)
        flying: deque[_Flying] = deque()
        coming = self._fetcher.submit(self._fetch, positions[start * size : start * size + stretch])
        for begin in begins:
            data = coming.result()
            if begin + stretch < len(positions):
                coming = self._fetcher.submit(self._fetch, positions[begin + stretch : begin + 2 * stretch])
            for first in range(0, len(data), size):
                flying.append(self._decode(data[first : first + size], positions[begin + first : begin + first + size]))
                if len(flying) > _AHEAD:
                    yield _landed(flying.popleft())
        while flying:
            yield _landed(flying.popleft())

    def _fetch(self, positions: Ints) -> list[memoryview]:
        """The bytes of these images; each row group that they lie in is read once."""
        found: list[memoryview] = [memoryview(b"")] * len(positions)
        groups = self._group_N[positions]
        order = np.argsort(groups, kind="stable")
        for places in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
            shard, group = divmod(int(groups[places[0]]), 1 << 32)
            column = _shard(self._names[shard]).read_row_group(group, columns=["image"], use_threads=False).column(0)
            array = column.chunk(0)
            ends = np.frombuffer(array.buffers()[1], np.int32)[array.offset :]
            data = memoryview(array.buffers()[2]).cast("B")
            for place, row in zip(places, self._row_N[positions[places]] % ROW_GROUP, strict=True):
                found[place] = memoryview(bytes(data[ends[row] : ends[row + 1]]))  # not the group that it lies in
        return found

    def _decode(self, data: list[memoryview], positions: Ints) -> _Flying:
        crops = np.empty((len(data), self._size_px, self._size_px, 3), np.uint8)

        def work(first: int) -> None:
            for i in range(first, min(first + _PIECE, len(data))):
                crops[i] = prepare(data[i], self._scale_N[positions[i]], self._field_um, self._size_px)

        return _Flying(crops, [self._decoders.submit(work, first) for first in range(0, len(data), _PIECE)])


def _landed(batch: _Flying) -> NDArray[np.uint8]:
    for piece in batch.pieces:
        piece.result()
    return batch.crops


@lru_cache(maxsize=1024)
def _shard(path: str) -> pq.ParquetFile:
    return pq.ParquetFile(Path(path), memory_map=True)


def prepare(
    data: bytes | memoryview,
    microns_per_px: float,
    field_um: float,
    size_px: int,
    pixels: images.UInt8Array | None = None,
) -> images.UInt8Array:
    """Image bytes to the crop that the network sees; the one way, in training and in service.

    pixels: the whole picture, where it was decoded already. Raises ImageError.
    """
    needed = size_px * microns_per_px / field_um
    if needed <= 0.5 and data[:2] == b"\xff\xd8":
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            least = {"min_height": int(np.ceil(height * needed)), "min_width": int(np.ceil(width * needed))}
            small = simplejpeg.decode_jpeg(data, "RGB", min_factor=2, **least)
            return images.crop(small, microns_per_px * width / small.shape[1], field_um, size_px)
        except ValueError:
            pass  # CMYK and other rarities
    whole = images.decode(bytes(data)) if pixels is None else pixels
    return images.crop(whole, microns_per_px, field_um, size_px)


def targets(
    frame: pd.DataFrame, types: tuple[str, ...], characteristics: dict[str, tuple[str, ...]]
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """(N x T allowed types, N x K value positions with -1 for no label) of labelled cells."""
    words = vocabulary.load()
    column = {t: i for i, t in enumerate(types)}
    allowed = np.zeros((len(frame), len(types)), bool)
    for row, code in enumerate(frame["true_type"]):
        if isinstance(code, str):
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


def epoch_order(groups: Ints, weights: NDArray[np.float64], size: int, seed: int, epoch: int) -> Ints:
    """`size` positions for one epoch: systematic sampling (each image floor or ceil of its expected count), by row groups.

    An image that is drawn k times comes with k visits of its group, each at another time. Depends on seed and epoch alone,
    never on workers or ranks.

    Args:
        groups: the row group of each image (Crops.groups). weights: the chance of each image; they sum to 1.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(weights))
    steps = np.floor(np.cumsum(weights[order]) * size + random.random()).astype(np.int64)
    steps[-1] = size
    times = np.empty(len(weights), np.int64)
    times[order] = np.diff(np.minimum(steps, size), prepend=0)
    position = np.repeat(np.arange(len(weights)), times)
    copy = np.arange(size) - np.repeat(np.cumsum(times) - times, times)
    visit = np.unique(groups[position] * (int(copy.max()) + 1) + copy, return_inverse=True)[1]
    queue = position[np.argsort(random.permutation(int(visit.max()) + 1)[visit], kind="stable")]
    lanes = queue.reshape(LANES if size % LANES == 0 else 1, -1)
    stretch = np.arange(lanes.shape[1]) // MIX
    mixed = [lane[np.lexsort((random.random(len(lane)), stretch))] for lane in lanes]
    return np.stack(mixed, axis=1).ravel()
