"""Near duplicates: the same picture exported again (another JPEG quality, a pixel of shift, a small resize).

Each image carries a 16 x 16 luminance thumbnail. Two images are near duplicates where the correlation of their
thumbnails (zero mean, unit norm: a unit vector d of 256 numbers) is at least `MIN_CORRELATION`. The search is exact:
|a - b|^2 = 2 (1 - a.b), and an orthonormal projection never lengthens a distance, so a ball query on a few low-frequency
DCT coefficients finds every pair, and the full vectors confirm it. Threshold and false-alarm rate are measured in
bench/near_duplicates.py on real images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from smearline.images import THUMBNAIL_PX

MIN_CORRELATION = 0.975
_QUERY_COEFFICIENTS = 4  # the lowest 4 x 4 of the DCT, less the constant: 15 numbers


def unit_vectors(thumbnails: Sequence[bytes]) -> NDArray[np.float32]:
    """Thumbnails (N x 256 bytes) as N x 256 zero-mean unit vectors; a flat picture becomes the zero vector."""
    pixels = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, THUMBNAIL_PX**2).astype(np.float32)
    centred = pixels - pixels.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return centred / np.where(norms > 1.0, norms, np.inf)


def pairs(thumbnails: Sequence[bytes], min_correlation: float = MIN_CORRELATION) -> NDArray[np.int64]:
    """All pairs (P x 2 positions, first < second) whose thumbnails correlate at least so much."""
    vectors = unit_vectors(thumbnails)
    told_apart = np.flatnonzero(vectors.any(axis=1))  # a flat picture is like nothing
    if len(told_apart) < 2:
        return np.empty((0, 2), np.int64)
    spectrum = dctn(vectors[told_apart].reshape(-1, THUMBNAIL_PX, THUMBNAIL_PX), axes=(1, 2), norm="ortho")
    low = spectrum[:, :_QUERY_COEFFICIENTS, :_QUERY_COEFFICIENTS].reshape(len(told_apart), -1)[:, 1:]
    radius = float(np.sqrt(2.0 * (1.0 - min_correlation))) * 1.0001
    candidates = told_apart[cKDTree(low).query_pairs(radius, output_type="ndarray")]
    confirmed = [
        part[np.einsum("ij,ij->i", vectors[part[:, 0]], vectors[part[:, 1]]) >= min_correlation]
        for part in np.array_split(candidates, len(candidates) // 100_000 + 1)
    ]
    return np.asarray(np.concatenate(confirmed), np.int64)


def groups(count: int, linked: NDArray[np.int64]) -> NDArray[np.int64]:
    """The connected component (0, 1, ...) of each of `count` images, given linked pairs (P x 2)."""
    graph = coo_array((np.ones(len(linked)), (linked[:, 0], linked[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
