"""What a name rests on: places of the crop are covered one after the other, and the recogniser is asked again (Zeiler & Fergus
2014, ECCV).

It needs nothing of the network but its answers. Class activation maps were tried in its place: at 96 to 160 px a place of the last
feature map sees the whole crop, and the maps of real networks peaked in a corner, not on the cell.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smearline import images
from smearline.images import UInt8Array

GRID = 8
"""Places along a side; each is covered with its neighbours half-way round, so that neighbours overlap."""
_TINT = np.array([255.0, 214.0, 0.0])
_STRENGTH = 0.65
Floats = NDArray[np.floating]


def covered(crop_HWC: UInt8Array) -> UInt8Array:
    """1 + GRID * GRID x H x W x 3: the crop, and the crop with each place, row by row, in the colour of the background."""
    height, width = crop_HWC.shape[:2]
    found = np.repeat(crop_HWC[None], 1 + GRID * GRID, axis=0)
    colour = images.background(crop_HWC)
    for place in range(GRID * GRID):
        row, column = divmod(place, GRID)
        rows, columns = (
            slice(max(0, round((i - 0.5) * side / GRID)), round((i + 1.5) * side / GRID))
            for i, side in ((row, height), (column, width))
        )
        found[1 + place, rows, columns] = colour
    return found


def drop(probability_N: Floats) -> NDArray[np.float64]:
    """GRID x GRID: by how much the log-odds of a type fall where a place is covered; from its probabilities on `covered` crops."""
    p = np.clip(probability_N.astype(float), 1e-6, 1 - 1e-6)
    odds = np.log(p / (1 - p))
    found: NDArray[np.float64] = (odds[0] - odds[1:]).reshape(GRID, GRID)
    return found


def overlay(crop_HWC: UInt8Array, drop_GG: Floats) -> UInt8Array:
    """The crop with what speaks for the type in yellow, strongest where covering it cost most; what speaks against it is left."""
    weight = np.maximum(drop_GG, 0).astype(np.float32)
    weight = weight / weight.max() if weight.max() > 0 else weight
    size = (crop_HWC.shape[1], crop_HWC.shape[0])
    share = _STRENGTH * np.asarray(Image.fromarray(weight).resize(size, Image.Resampling.BILINEAR))[:, :, None]
    found: UInt8Array = (crop_HWC * (1 - share) + _TINT * share).round().astype(np.uint8)
    return found


def png(crop_HWC: UInt8Array, drop_GG: Floats) -> bytes:
    """The crop, and beside it the overlay."""
    out = io.BytesIO()
    Image.fromarray(np.hstack([crop_HWC, overlay(crop_HWC, drop_GG)])).save(out, "PNG")
    return out.getvalue()
