"""Near duplicates: the same picture exported again (another JPEG quality, a pixel of shift, a small resize).

Each image carries a 16 x 16 luminance thumbnail. Two images are near duplicates where the correlation of their
thumbnails (zero mean, unit norm: a unit vector d of 256 numbers) is at least `MIN_CORRELATION`. The search is exact:
|a - b|^2 = 2 (1 - a.b), and an orthonormal projection never lengthens a distance, so that pairs which are near in a few
low-frequency DCT coefficients hold every pair, and the full vectors confirm it. In so many dimensions a tree looks at nearly every
point, so points are compared by matrix products, slab by slab of the two coefficients that vary most: memory is that of a block,
and time grows with the square of the images. Threshold and false-alarm rate are measured by bench/near_duplicates.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from smearline.images import THUMBNAIL_PX

MIN_CORRELATION = 0.975
_COEFFICIENTS = 5  # the lowest 5 x 5 of the DCT, less the constant: 24 numbers
_BLOCK = 2048


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
    low = spectrum[:, :_COEFFICIENTS, :_COEFFICIENTS].reshape(len(told_apart), -1)[:, 1:]
    radius = float(np.sqrt(2.0 * (1.0 - min_correlation))) * 1.001  # float32 has room to err
    found = [np.empty((0, 2), np.int64)]
    for first, second in _near(low, radius):
        pair = np.sort(told_apart[np.stack([first, second], axis=1)], axis=1)
        found.append(pair[np.einsum("ij,ij->i", vectors[pair[:, 0]], vectors[pair[:, 1]]) >= min_correlation])
    whole = np.concatenate(found)
    return np.asarray(whole[np.lexsort((whole[:, 1], whole[:, 0]))], np.int64)


def _near(points_NC: NDArray[np.float32], radius: float) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Positions of all pairs not further apart than `radius`, each once, a block at a time."""
    by, then = np.argsort(points_NC.var(axis=0))[::-1][:2]
    slab_N = np.floor(points_NC[:, by] / radius).astype(np.int64)
    order = np.lexsort((points_NC[:, then], slab_N))
    # a.b - |a|^2/2 - |b|^2/2 = -|a - b|^2/2, as one product.
    half_N1, one_N1 = np.square(points_NC).sum(axis=1, keepdims=True) / -2, np.ones((len(points_NC), 1), np.float32)
    left, right = np.hstack([points_NC, half_N1, one_N1])[order], np.hstack([points_NC, one_N1, half_N1])[order]
    slabs, starts = np.unique(slab_N[order], return_index=True)
    ends, place = np.append(starts[1:], len(order)), {slab: i for i, slab in enumerate(slabs)}
    along = points_NC[order, then]
    for i, slab in enumerate(slabs):
        for j in [i, place[slab + 1]] if slab + 1 in place else [i]:
            for first in range(starts[i], ends[i], _BLOCK):
                last = min(first + _BLOCK, ends[i])
                within = along[starts[j] : ends[j]]
                low = starts[j] + np.searchsorted(within, along[first] - radius)
                high = starts[j] + np.searchsorted(within, along[last - 1] + radius, "right")
                a, b = np.nonzero(left[first:last] @ right[low:high].T >= -(radius**2) / 2)
                a, b = a + first, b + low
                keep = a < b if i == j else slice(None)
                yield order[a[keep]], order[b[keep]]


def groups(count: int, linked: NDArray[np.int64]) -> NDArray[np.int64]:
    """The connected component (0, 1, ...) of each of `count` images, given linked pairs (P x 2)."""
    graph = coo_array((np.ones(len(linked)), (linked[:, 0], linked[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
