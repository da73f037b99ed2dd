"""The slide before light passes through it: how much of each dye lies at each pixel, in optical density."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from smearline.simulator.shapes import Field
from smearline.simulator.textures import Textures

Dyes = tuple[float, float, float]
"""Amounts of eosin (pink), azure (blue) and their purple Romanowsky complex, as optical density at each dye's peak."""


@dataclass(frozen=True)
class Window:
    """A part of the canvas seen from a cell's centre.

    `dye_DHW` is a view [3, h, w], float32; `x` [1, w] and `y` [h, 1] are micrometres from the centre.
    """

    dye_DHW: Field
    x: Field
    y: Field
    textures: Textures
    rng: np.random.Generator

    @property
    def shape(self) -> tuple[int, int]:
        return self.y.shape[0], self.x.shape[1]

    def texture(self, name: str) -> Field:
        return self.textures.cut(name, self.shape, self.rng)

    def warped(self, amplitude_um: float, name: str = "warp") -> tuple[Field, Field]:
        """Coordinates displaced by smooth noise, so that a disc drawn in them has a living outline."""
        return self.x + amplitude_um * self.texture(name), self.y + amplitude_um * self.texture(name)

    def paint(self, mask: Field, amounts: Dyes, gain: Field | None = None) -> None:
        """Replace what lies under `mask` (0..1) by the amounts, times `gain` where given."""
        for dye, amount in zip(self.dye_DHW, amounts, strict=True):
            dye += mask * ((amount if gain is None else amount * gain) - dye)

    def add(self, mask: Field, amounts: Dyes) -> None:
        """Lay more dye over what is there; negative amounts bleach."""
        for dye, amount in zip(self.dye_DHW, amounts, strict=True):
            if amount:
                dye += amount * mask


@dataclass(frozen=True)
class Canvas:
    """A square picture's dyes [3, size, size], float32, 0 where the glass is bare."""

    dye_DHW: Field
    microns_per_px: float
    textures: Textures

    @property
    def half_um(self) -> float:
        return self.dye_DHW.shape[2] * self.microns_per_px / 2

    def window(self, cx: float, cy: float, radius_um: float, rng: np.random.Generator) -> Window | None:
        """The square of half side `radius_um` about a point (µm from the middle); None where it lies outside."""
        size, scale = self.dye_DHW.shape[2], self.microns_per_px
        spans = []
        for centre in (cx, cy):
            middle = size / 2 + centre / scale
            first, last = (
                max(math.floor(middle - radius_um / scale), 0),
                min(math.ceil(middle + radius_um / scale), size),
            )
            if first >= last:
                return None
            spans.append((first, last, ((np.arange(first, last) + 0.5 - middle) * scale).astype(np.float32)))
        (left, right, x), (top, bottom, y) = spans
        return Window(self.dye_DHW[:, top:bottom, left:right], x[None, :], y[:, None], self.textures, rng)


def blank(size_px: int, microns_per_px: float, textures: Textures) -> Canvas:
    return Canvas(np.zeros((3, size_px, size_px), dtype=np.float32), microns_per_px, textures)
