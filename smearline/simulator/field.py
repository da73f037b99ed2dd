"""The picture of one cell: red cells and platelets around it, the cell in the middle, a neighbour at the border."""

import math
from cmath import rect
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from smearline.simulator import cells, debris
from smearline.simulator.canvas import Canvas, Field, coverage, ellipse
from smearline.simulator.optics import Look, develop
from smearline.simulator.population import Cell, style, tables

NUM_RED_SPRITES = 64
DISGUISES = ("NEUT_SEG", "MYELO", "BLAST", "LYMPH", "MONO", "LYMPH_ATYP")


def picture(
    cell: Cell, size_px: int, microns_per_px: float, look: Look, crowding: float, seed: np.random.SeedSequence
) -> NDArray[np.uint8]:
    """A cell's picture, uint8 [size, size, 3].

    Args:
        crowding: red cells as a share of what fits, 0..1.
        seed: the same seed gives the same surroundings, whatever the cell's characteristics.
    """
    around, inner, camera = (np.random.default_rng(s) for s in seed.spawn(3))
    slide = Canvas(size_px, microns_per_px)
    defocus, crushed = camera.lognormal(0, 0.12), False
    if cell.type == "UNIDENTIFIED":
        crushed = bool(camera.random() < 0.4)
        defocus *= 1.0 if crushed else camera.uniform(2.6, 4.5)
        disguise = DISGUISES[int(camera.integers(len(DISGUISES)))]
        cell = replace(cell, type=disguise, traits={"cell_shape": "irregular"} if crushed else {})
    touching = _red_cells(slide, cell, crowding, around)
    if around.random() < 0.15:
        _neighbour(slide, around)
    window = slide.window(0j, cell.diameter_um * 0.62 + 2.6, inner)
    assert window is not None
    if crushed:
        window = replace(window, xy=window.warped(1.5, "fold", "warp"))
    cells.draw(window, cell, touching)
    return develop(slide, look, defocus, camera)


def _red_cells(slide: Canvas, cell: Cell, crowding: float, rng: np.random.Generator) -> list[complex]:
    """Scatter red cells and a few platelets; returns the red cells that a reactive cell in the middle touches."""
    radius, half, scale = cell.diameter_um / 2, slide.half_um + 2.5, slide.microns_per_px
    red = tables("styles")["red_cell_diameter_um"][0] / 2
    touching, turn = [], rng.uniform(-math.pi, math.pi)
    for i in range(int(rng.integers(1, 4))):
        reach, angle = radius + red - rng.uniform(0.3, 1.5), turn + i * 2.1 + rng.normal(0, 0.2)
        touching.append(rect(reach, angle))
    placed = touching = touching if cell.has("reactive_cytoplasm") else []
    keep_off = radius * (0.97 if cell.type in debris.DRAWN else 1.0) + red - 0.4
    for x, y in rng.uniform(-half, half, (int(10 + 50 * crowding), 2)).tolist():
        spot, near = complex(x, y), 2 * red * rng.uniform(0.80, 1.05)
        if abs(spot) > keep_off and all(abs(spot - other) > near for other in placed):
            placed = [*placed, spot]
    sprites = _red_sprites(scale)
    size, span = slide.dye_DHW.shape[1], sprites[0].shape[0]
    thickness = np.zeros((size + 2 * span, size + 2 * span), np.float32)  # with a margin for what is cut off
    for spot in placed:
        left, top = (round(size / 2 + at / scale - span / 2) + span for at in (spot.real, spot.imag))
        thickness[top : top + span, left : left + span] += sprites[int(rng.integers(NUM_RED_SPRITES))]
    for dye, amount in zip(slide.dye_DHW, tables("styles")["red_cell"], strict=True):
        dye += amount * thickness[span:-span, span:-span]
    for _ in range(int(rng.poisson(0.5))):
        spot = complex(*rng.uniform(-half, half, 2).tolist())
        if abs(spot) > radius + 2.2 and (window := slide.window(spot, 2.8, rng)):
            debris.platelet(window, rng.uniform(0.9, 1.5))
    return touching


def _neighbour(slide: Canvas, rng: np.random.Generator) -> None:
    """Part of another leucocyte at the picture's border."""
    kind = ("NEUT_SEG", "LYMPH", "NEUT_SEG", "MYELO")[int(rng.integers(4))]
    diameter = rng.normal(*style(kind).diameter_um)
    angle, reach = rng.uniform(-math.pi, math.pi), slide.half_um + diameter / 2 - rng.uniform(1.0, 3.5)
    if window := slide.window(rect(reach, angle), diameter / 2 + 1.5, rng):
        shape = {"nucleus_shape": "segmented-multilobed"} if kind == "NEUT_SEG" else {}
        cells.draw(window, Cell(kind, diameter, shape))


@cache
def _red_sprites(microns_per_px: float) -> list[Field]:
    """Red cells as thickness, about 1 at the rim and less in the central pallor."""
    rng, sprites = np.random.default_rng(7), []
    for _ in range(NUM_RED_SPRITES):
        window = Canvas(math.ceil(9.6 / microns_per_px), microns_per_px).window(0j, 4.8, rng)
        assert window is not None
        radius = rng.normal(*tables("styles")["red_cell_diameter_um"]) / 2
        stretch = rng.lognormal(0, 0.06)
        xy = window.warped(rng.uniform(0.1, 0.3))
        body = ellipse(xy, 0j, radius * stretch, radius / stretch, rng.uniform(0, math.pi))
        rho = np.maximum(body + radius, 0) * (1 / radius)
        pallor = rng.uniform(0.3, 0.95) * np.exp(-np.square(rho / rng.uniform(0.38, 0.56)))
        rim = 0.12 * np.exp(-np.square((body + 0.5) / 0.45))
        sprites.append((coverage(body, 0.3) * (0.95 - pallor + rim)).astype(np.float32))
    return sprites
