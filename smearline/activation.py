"""What the network saw: class activation maps (Zhou 2016, CVPR) from the packaged model's own outputs, without torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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


def overlay(crop_HWC: UInt8Array, map_hw: NDArray[np.float32]) -> UInt8Array:
    """The crop with what speaks for the type in yellow, strongest where the map is highest; what speaks against it is left."""
    weight = np.maximum(map_hw, 0)
    weight = weight / weight.max() if weight.max() > 0 else weight
    height, width = crop_HWC.shape[:2]
    large = np.asarray(Image.fromarray(weight.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    share = _STRENGTH * np.clip(large, 0, 1)[:, :, None]
    found: UInt8Array = (crop_HWC * (1 - share) + _TINT * share).round().astype(np.uint8)
    return found
