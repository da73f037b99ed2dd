"""What the network saw: class activation maps (Zhou 2016, CVPR) from the packaged model's own outputs, without torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from smearline.images import UInt8Array
from smearline.recognition import RecognitionModel

_TINT = np.array([255.0, 214.0, 0.0])
_STRENGTH = 0.65
_BATCH = 32


def maps(model: RecognitionModel, crops_BHWC: UInt8Array, types: Sequence[str]) -> NDArray[np.float32]:
    """B x h x w: what each place of a crop adds to the logit of the type named for it; its mean is that logit less the bias.

    Raises:
        ValueError: a type that the model was not trained on.
    """
    column = [model.card.types.index(t) for t in types]
    starts = range(0, len(crops_BHWC), _BATCH)
    parts = [model.run(crops_BHWC[s : s + _BATCH], "activation_maps")[0] for s in starts]
    return np.concatenate([p[np.arange(len(p)), column[s : s + len(p)]] for s, p in zip(starts, parts, strict=True)])


def overlay(crop_HWC: UInt8Array, map_hw: NDArray[np.float32], map_px: tuple[float, float] | None = None) -> UInt8Array:
    """The crop with what speaks for the type in yellow, strongest where the map is highest; what speaks against it is left.

    Args:
        map_px: the card's; without it the map is taken for a smaller picture of the crop.
    """
    weight = np.maximum(map_hw, 0)
    weight = weight / weight.max() if weight.max() > 0 else weight
    for axis in (0, 1):
        weight = _along(weight, axis, crop_HWC.shape[axis], map_px)
    share = _STRENGTH * weight[:, :, None]
    found: UInt8Array = (crop_HWC * (1 - share) + _TINT * share).round().astype(np.uint8)
    return found


def _along(
    weight: NDArray[np.float32], axis: int, size: int, map_px: tuple[float, float] | None
) -> NDArray[np.float32]:
    """Linear between the places, and the nearest place's value beyond the last."""
    places = weight.shape[axis]
    first, step = map_px or (size / places / 2, size / places)
    at = np.clip((np.arange(size) + 0.5 - first) / step, 0, places - 1)
    low = np.minimum(np.floor(at).astype(int), max(places - 2, 0))
    share = (at - low).reshape([-1, 1] if axis == 0 else [1, -1])
    below, above = (np.take(weight, np.minimum(low + i, places - 1), axis=axis) for i in (0, 1))
    return np.asarray(below * (1 - share) + above * share)
