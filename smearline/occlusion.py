"""What a name rests on: places of the crop are covered one after the other, and the recogniser is asked again (Zeiler & Fergus
2014, ECCV). It needs nothing of the network but its answers (docs/decisions/011).
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from smearline import images
from smearline.images import UInt8Array

GRID = 7
"""Places along a side; each is covered with its neighbours half-way round, so that neighbours overlap."""
_PLAIN = 1.0
"""A fall from which a place is drawn at full strength, unless another falls farther: less is not blown up into evidence."""
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


def drop(types_NT: Floats, column: int) -> NDArray[np.float64]:
    """GRID x GRID: by how much a type's lead over the next most probable one falls where a place is covered.

    Args:
        types_NT: type probabilities of the `covered` crops, (1 + GRID * GRID) x T. column: of the type.

    Returns:
        Differences of log(probability of the type / highest of the others), which, unlike the odds, does not run out of digits
        where the type is all but certain.
    """
    logs = np.log(np.maximum(types_NT.astype(float), 1e-37))
    lead = logs[:, column] - np.delete(logs, column, axis=1).max(axis=1)
    found: NDArray[np.float64] = (lead[0] - lead[1:]).reshape(GRID, GRID)
    return found


def overlay(crop_HWC: UInt8Array, drop_GG: Floats) -> UInt8Array:
    """The crop with what speaks for the type in yellow, strongest where covering it cost most; what speaks against it is left."""
    weight = (np.maximum(drop_GG, 0) / max(_PLAIN, float(drop_GG.max()))).astype(np.float32)
    size = (crop_HWC.shape[1], crop_HWC.shape[0])
    share = _STRENGTH * np.asarray(Image.fromarray(weight).resize(size, Image.Resampling.BILINEAR))[:, :, None]
    found: UInt8Array = (crop_HWC * (1 - share) + _TINT * share).round().astype(np.uint8)
    return found


def png(crop_HWC: UInt8Array, drop_GG: Floats) -> bytes:
    """The crop, and beside it the overlay."""
    out = io.BytesIO()
    Image.fromarray(np.hstack([crop_HWC, overlay(crop_HWC, drop_GG)])).save(out, "PNG")
    return out.getvalue()
