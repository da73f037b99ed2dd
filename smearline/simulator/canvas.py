"""The slide before light passes through it: how much of each dye lies at each pixel, and what it is drawn with.

Shapes are signed distances in micrometres, negative inside (formulae after Quilez, '2D SDFs'). Coordinates (x, y) are
float32 arrays of one broadcastable shape, points are complex numbers; every scalar is a Python float, so that nothing
is widened to float64. Textures are band-limited noise and granules, made once for a scale and then cut at random places.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Self

import numpy as np
from numpy.typing import NDArray

from smearline.simulator.population import tables

Field = NDArray[np.float32]
XY = tuple[Field, Field]
Dyes = Sequence[float] | NDArray[np.float64]
"""Amounts of eosin (pink), azure (blue) and their purple Romanowsky complex, as optical density at each dye's peak."""
TILE_PX = 512
MARGIN_PX = 320  # no picture may be larger than this


def disc(xy: XY, centre: complex, radius: float) -> Field:
    return np.sqrt(np.square(xy[0] - centre.real) + np.square(xy[1] - centre.imag)) - radius


def ellipse(xy: XY, centre: complex, a: float, b: float, angle: float) -> Field:
    """Half axes `a` and `b`; exact on the outline, nearly so close to it."""
    x, y, cos, sin = xy[0] - centre.real, xy[1] - centre.imag, math.cos(angle), math.sin(angle)
    u, v = x * (cos / a) + y * (sin / a), y * (cos / b) - x * (sin / b)
    return (np.sqrt(u * u + v * v) - 1.0) * min(a, b)


def rod(xy: XY, start: complex, end: complex, radius: float) -> Field:
    """Straight, with round ends from `start` to `end`."""
    way, x, y = end - start, xy[0] - start.real, xy[1] - start.imag
    along = np.clip((x * way.real + y * way.imag) / max(way.real * way.real + way.imag * way.imag, 1e-6), 0.0, 1.0)
    return np.sqrt(np.square(x - along * way.real) + np.square(y - along * way.imag)) - radius


def sausage(xy: XY, centre: complex, bend: float, half_arc: float, thickness: float, angle: float) -> Field:
    """A sausage bent along a circle of radius `bend` about `centre`, `half_arc` radians to each side of `angle`."""
    x, y, cos, sin = xy[0] - centre.real, xy[1] - centre.imag, math.cos(angle), math.sin(angle)
    u, v = np.abs(y * cos - x * sin), x * cos + y * sin
    end_u, end_v = math.sin(half_arc), math.cos(half_arc)
    to_end = np.sqrt(np.square(u - end_u * bend) + np.square(v - end_v * bend))
    return np.where(end_v * u > end_u * v, to_end, np.abs(np.sqrt(u * u + v * v) - bend)) - thickness


def union(a: Field, b: Field, blend: float) -> Field:
    """Both shapes; `blend` µm of flesh where they meet."""
    h = np.maximum(blend - np.abs(a - b), 0.0)
    return np.minimum(a, b) - h * h * (0.25 / blend)


def coverage(distance: Field, edge_um: float) -> Field:
    """Signed distance to a mask in 0..1 whose edge is `edge_um` wide."""
    return np.clip(0.5 - distance * (1.0 / edge_um), 0.0, 1.0)


@cache
def tiles(microns_per_px: float) -> dict[str, Field]:
    """Textures that wrap around, float32, TILE_PX + MARGIN_PX on a side.

    They depend on the scale alone, never on a seed: randomness lies in where they are cut.
    """
    rng, styles = np.random.default_rng(20240101), tables("styles")
    made = {name: _noise(rng, wavelength / microns_per_px) for name, wavelength in styles["noises_um"].items()}
    for name, (radius, density) in styles["granules"].items():
        made[name] = _granules(rng, radius / microns_per_px, density * microns_per_px**2)
    made["sensor"] = rng.standard_normal((TILE_PX, TILE_PX), dtype=np.float32)
    return {name: np.pad(tile, (0, MARGIN_PX), mode="wrap") for name, tile in made.items()}


def _noise(rng: np.random.Generator, wavelength_px: float) -> Field:
    """Gaussian noise in a band about one wavelength, mean 0, standard deviation 1."""
    frequency = np.hypot(np.fft.fftfreq(TILE_PX)[:, None], np.fft.rfftfreq(TILE_PX)[None, :])
    band = np.exp(-0.5 * np.square((frequency * wavelength_px - 1.0) / 0.45))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((TILE_PX, TILE_PX))) * band)
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _granules(rng: np.random.Generator, radius_px: float, per_px: float) -> Field:
    """Scattered dots of one radius and unequal strength."""
    number = math.ceil(per_px * TILE_PX**2)
    seeds = np.zeros((TILE_PX, TILE_PX))
    np.add.at(seeds, tuple(rng.integers(0, TILE_PX, (2, number))), rng.uniform(0.5, 1.15, number))
    offset = np.minimum(np.arange(TILE_PX), TILE_PX - np.arange(TILE_PX))
    dot = np.clip(radius_px + 0.6 - np.hypot(offset[:, None], offset[None, :]), 0.0, 1.0)
    return np.clip(np.fft.irfft2(np.fft.rfft2(seeds) * np.fft.rfft2(dot)), 0.0, 1.3).astype(np.float32)


def cut(tile: Field, shape: tuple[int, ...], rng: np.random.Generator) -> Field:
    """A random piece of a tile, `shape` px, as it lies or turned over."""
    row, column, turn = rng.integers(0, TILE_PX, 3).tolist()
    return (tile.T if turn % 2 else tile)[row : row + shape[0], column : column + shape[1]]


@dataclass(frozen=True)
class Window:
    """A part of the canvas seen from a cell's centre: a view [3, h, w] of the dyes, float32, and its coordinates."""

    dye_DHW: Field
    xy: XY  # micrometres from the centre: [1, w] and [h, 1] until they are displaced
    tiles: dict[str, Field]
    rng: np.random.Generator

    def texture(self, name: str) -> Field:
        return cut(self.tiles[name], self.dye_DHW.shape[1:], self.rng)

    def warped(self, amplitude_um: float, name: str = "warp", name_y: str | None = None) -> XY:
        """Coordinates displaced by smooth noise, so that a disc drawn in them has a living outline."""
        x, y = self.xy
        return x + amplitude_um * self.texture(name), y + amplitude_um * self.texture(name_y or name)

    def about(self, point: complex) -> Self:
        """The same part seen from another point."""
        return replace(self, xy=(self.xy[0] - point.real, self.xy[1] - point.imag))

    def paint(self, mask: Field, amounts: Dyes, gain: Field | None = None) -> None:
        """Replace what lies under `mask` (0..1) by the amounts, times `gain` where given."""
        for dye, amount in zip(self.dye_DHW, amounts, strict=True):
            dye += mask * ((float(amount) if gain is None else float(amount) * gain) - dye)

    def add(self, mask: Field, amounts: Dyes) -> None:
        """Lay more dye over what is there."""
        for dye, amount in zip(self.dye_DHW, amounts, strict=True):
            if amount:
                dye += float(amount) * mask


class Canvas:
    """A square picture's dyes [3, size, size], float32, 0 where the glass is bare."""

    def __init__(self, size_px: int, microns_per_px: float) -> None:
        self.dye_DHW: Field = np.zeros((3, size_px, size_px), np.float32)
        self.microns_per_px, self.half_um = microns_per_px, size_px * microns_per_px / 2

    def window(self, centre: complex, radius_um: float, rng: np.random.Generator) -> Window | None:
        """The square of half side `radius_um` about a point (µm from the middle); None where it lies outside."""
        size, scale = self.dye_DHW.shape[2], self.microns_per_px
        spans, coordinates = [], []
        for middle in (size / 2 + centre.real / scale, size / 2 + centre.imag / scale):
            first = max(math.floor(middle - radius_um / scale), 0)
            last = min(math.ceil(middle + radius_um / scale), size)
            if first >= last:
                return None
            spans.append(slice(first, last))
            coordinates.append(((np.arange(first, last) + 0.5 - middle) * scale).astype(np.float32))
        xy = coordinates[0][None, :], coordinates[1][:, None]
        return Window(self.dye_DHW[:, spans[1], spans[0]], xy, tiles(scale), rng)
