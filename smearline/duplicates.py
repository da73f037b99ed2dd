"""Near duplicates: the same picture exported again (another JPEG quality, a pixel of shift, a small resize).

Two images are near duplicates where the correlation of their thumbnails (zero mean, unit norm: a unit vector of 256 numbers) is at
least `MIN_CORRELATION`. The search is exact: pairs that are near in a few low-frequency DCT coefficients hold every pair, and the
full vectors confirm it. Why blocks of matrix products and no tree, and what was measured: docs/decisions/003.
"""

import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from threadpoolctl import threadpool_limits

from smearline import lookup
from smearline.images import THUMBNAIL_PX

MIN_CORRELATION = 0.975
_COEFFICIENTS = 5  # the lowest 5 x 5 of the DCT, less the constant: 24 numbers
_BLOCK = 768
_CHUNK = 1 << 16


def unit_vectors(thumbnails: Sequence[bytes]) -> NDArray[np.float32]:
    """Thumbnails (N x 256 bytes) as N x 256 zero-mean unit vectors; a flat picture becomes the zero vector."""
    pixels = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL_PX**2).astype(np.float32)
    centred = pixels - pixels.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(norms > 1.0, norms, np.inf)


def pairs(
    thumbnails: Sequence[bytes],
    min_correlation: float = MIN_CORRELATION,
    *,
    new: NDArray[np.bool_] | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> NDArray[np.int64]:
    """All pairs (P x 2 positions, first < second) whose thumbnails correlate at least so much.

    Args:
        new: only pairs with one of these; None: all pairs.
        progress: called with (images compared, images to compare).
    """
    chunks = range(0, len(thumbnails), _CHUNK)
    low = np.concatenate(
        [np.empty((0, _COEFFICIENTS**2 - 1), np.float32), *(_low(thumbnails[i : i + _CHUNK]) for i in chunks)]
    )
    told_apart = np.flatnonzero(low.any(axis=1))  # a flat picture is like nothing
    fresh = np.ones(len(thumbnails), bool) if new is None else new
    if len(told_apart) < 2 or not fresh[told_apart].any():
        return np.empty((0, 2), np.int64)
    radius = float(np.sqrt(2.0 * (1.0 - min_correlation))) * 1.001  # float32 has room to err
    near = np.sort(told_apart[_near(low[told_apart], fresh[told_apart], radius, progress)], axis=1)
    found = [near[:0]]
    for i in range(0, len(near), _CHUNK):
        part = near[i : i + _CHUNK]
        first, second = (unit_vectors([thumbnails[place] for place in part[:, side]]) for side in (0, 1))
        found.append(part[np.einsum("ij,ij->i", first, second) >= min_correlation])
    whole = np.concatenate(found)
    return np.asarray(whole[np.lexsort((whole[:, 1], whole[:, 0]))], np.int64)


def kept_pairs(
    file: Path | None,
    sha256s: Sequence[str],
    thumbnails: Sequence[bytes],
    min_correlation: float = MIN_CORRELATION,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> NDArray[np.int64]:
    """As `pairs`; what was found is kept in `file` (where one is named): next time only new images are compared with all."""
    thumbnails, bits = list(thumbnails), lookup.bits(pa.array(sha256s, pa.string()))
    searched, both = np.empty(0, np.uint64), np.empty((0, 2), np.int64)
    if file and file.exists():
        try:
            with np.load(file) as kept:
                if float(kept["min_correlation"]) == min_correlation:
                    rows = pd.Index(bits).get_indexer(kept["pairs"].ravel())
                    searched, both = kept["searched"], rows.reshape(-1, 2)
        except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
            pass  # damaged: all is searched again
    found = pairs(thumbnails, min_correlation, new=~np.isin(bits, searched), progress=progress)
    whole = np.unique(np.sort(np.concatenate([both[(both >= 0).all(axis=1)], found]), axis=1), axis=0)
    if file is None:
        return whole
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.new")  # an import removes what is called unfinished
    with unfinished.open("wb") as out:
        np.savez(out, min_correlation=min_correlation, searched=bits, pairs=bits[whole])
    unfinished.replace(file)
    return whole


def _low(thumbnails: Sequence[bytes]) -> NDArray[np.float32]:
    """Low-frequency coefficients, N x 24."""
    spectrum = dctn(unit_vectors(thumbnails).reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX), axes=(1, 2), norm="ortho")
    return np.ascontiguousarray(spectrum[:, :_COEFFICIENTS, :_COEFFICIENTS].reshape(len(thumbnails), -1)[:, 1:])


def _near(
    points_NC: NDArray[np.float32],
    new_N: NDArray[np.bool_],
    radius: float,
    progress: Callable[[int, int], object],
) -> NDArray[np.int64]:
    """Positions (P x 2) of all pairs with a new one that are not further apart than `radius`, each once."""
    main = np.linalg.eigh(np.cov(points_NC.T))[1][:, -1].astype(np.float32)
    order = np.argsort(points_NC @ main, kind="stable")
    points, new = points_NC[order], new_N[order]
    along = points @ main
    # a.b - |a|^2/2 - |b|^2/2 + r^2/2 = (r^2 - |a - b|^2)/2, as one product.
    half_N1, one_N1 = np.square(points).sum(axis=1, keepdims=True) / -2, np.ones((len(points), 1), np.float32)
    left, right = np.hstack([points, half_N1 + radius**2 / 2, one_N1]), np.hstack([points, one_N1, half_N1])
    from_N, all_new = np.flatnonzero(new), bool(new.all())

    def block(start: int) -> NDArray[np.int64]:
        mine = from_N[start : start + _BLOCK]
        begin = mine[0] if all_new else np.searchsorted(along, along[mine[0]] - radius)
        end, found = np.searchsorted(along, along[mine[-1]] + radius, "right"), [np.empty((0, 2), np.int64)]
        for first in range(begin, end, _BLOCK):
            last = min(first + _BLOCK, end)
            inside = left[mine] @ right[first:last].T
            if inside.max() >= 0:
                a, b = np.divmod(np.flatnonzero(inside >= 0), last - first)
                a, b = mine[a], b + first
                keep = (a < b) | ~new[b]
                found.append(np.stack([order[a[keep]], order[b[keep]]], axis=1))
        return np.concatenate(found)

    found = []
    with threadpool_limits(1), ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, part in enumerate(pool.map(block, range(0, len(from_N), _BLOCK)), 1):
            found.append(part)
            progress(min(number * _BLOCK, len(from_N)), len(from_N))
    return np.concatenate(found)


def groups(count: int, linked: NDArray[np.int64]) -> NDArray[np.int64]:
    """The connected component (0, 1, ...) of each of `count` images, given linked pairs (P x 2)."""
    graph = coo_array((np.ones(len(linked)), (linked[:, 0], linked[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
