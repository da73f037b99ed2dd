"""Band-limited noise and granules, made once for a scale and then cut at random places: nothing is drawn per image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from smearline.simulator.shapes import Field

TILE_PX = 512
MARGIN_PX = 320
"""No picture may be larger than this."""
# name -> wavelength in micrometres of unit-variance noise
NOISES = {"warp": 12.0, "fold": 5.0, "fringe": 1.5, "clump": 1.3, "fine": 0.62, "frost": 0.5, "cloud": 9.0}
# name -> (radius µm, number per µm²) of granules with soft edges, 0..1
GRANULES = {
    "granules_small": (0.14, 2.6),
    "granules_azurophil": (0.24, 0.85),
    "granules_toxic": (0.24, 1.5),
    "granules_coarse": (0.40, 1.25),
    "granules_round": (0.40, 2.1),
}


@dataclass(frozen=True)
class Textures:
    """Tiles that wrap around, float32, TILE_PX + MARGIN_PX on a side."""

    tiles: dict[str, Field]

    def cut(self, name: str, shape: tuple[int, int], rng: np.random.Generator) -> Field:
        """A random piece of a tile, `shape` px, as it lies or turned over."""
        row, column, turn = rng.integers(0, TILE_PX, 3).tolist()
        height, width = shape
        piece = self.tiles[name]
        if turn % 2:
            piece = piece.T
        return piece[row : row + height, column : column + width]


@cache
def textures(microns_per_px: float) -> Textures:
    """The tiles at a scale. They depend on the scale alone, never on a seed: randomness lies in where they are cut."""
    rng = np.random.default_rng(20240101)
    tiles = {name: _noise(rng, wavelength / microns_per_px) for name, wavelength in NOISES.items()}
    for name, (radius, density) in GRANULES.items():
        tiles[name] = _granules(rng, radius / microns_per_px, density * microns_per_px**2)
    tiles["sensor"] = rng.standard_normal((TILE_PX, TILE_PX), dtype=np.float32)
    return Textures({name: np.pad(tile, (0, MARGIN_PX), mode="wrap") for name, tile in tiles.items()})


def _frequency() -> NDArray[np.float64]:
    rows, columns = np.fft.fftfreq(TILE_PX)[:, None], np.fft.rfftfreq(TILE_PX)[None, :]
    return np.asarray(np.hypot(rows, columns))


def _noise(rng: np.random.Generator, wavelength_px: float) -> Field:
    """Gaussian noise in a band about one wavelength, mean 0, standard deviation 1."""
    band = np.exp(-0.5 * np.square((_frequency() * wavelength_px - 1.0) / 0.45))
    field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((TILE_PX, TILE_PX))) * band, s=(TILE_PX, TILE_PX))
    return ((field - field.mean()) / field.std()).astype(np.float32)


def _granules(rng: np.random.Generator, radius_px: float, per_px: float) -> Field:
    """Scattered dots of one radius and unequal strength."""
    number = math.ceil(per_px * TILE_PX**2)
    seeds = np.zeros((TILE_PX, TILE_PX))
    np.add.at(seeds, tuple(rng.integers(0, TILE_PX, (2, number))), rng.uniform(0.5, 1.15, number))
    offset = np.minimum(np.arange(TILE_PX), TILE_PX - np.arange(TILE_PX))
    dot = np.clip(radius_px + 0.6 - np.hypot(offset[:, None], offset[None, :]), 0.0, 1.0)
    field = np.fft.irfft2(np.fft.rfft2(seeds) * np.fft.rfft2(dot), s=(TILE_PX, TILE_PX))
    return np.clip(field, 0.0, 1.3).astype(np.float32)
