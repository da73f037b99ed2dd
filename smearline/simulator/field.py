"""The picture of one cell: red cells and platelets around it, the cell in the middle, a neighbour at the border."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from smearline.simulator import canvas, cells, debris, shapes
from smearline.simulator.canvas import Canvas
from smearline.simulator.cells import Cell
from smearline.simulator.optics import Look, develop
from smearline.simulator.styles import styles
from smearline.simulator.textures import textures

NUM_RED_SPRITES = 64
WINDOW_MARGIN_UM = 2.6
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
    tiles = textures(microns_per_px)
    slide = canvas.blank(size_px, microns_per_px, tiles)
    unidentified = cell.type == "UNIDENTIFIED"
    defocus = math.exp(camera.normal(0, 0.12))
    crushed = False
    if unidentified:
        crushed = bool(camera.random() < 0.4)
        defocus *= 1.0 if crushed else camera.uniform(2.6, 4.5)
        disguise = DISGUISES[int(camera.integers(len(DISGUISES)))]
        cell = replace(cell, type=disguise, traits={"cell_shape": "irregular"} if crushed else {})
    touching = _red_cells(slide, cell, crowding, around)
    if around.random() < 0.15:
        _neighbour(slide, around)
    window = slide.window(0.0, 0.0, cell.diameter_um * 0.62 + WINDOW_MARGIN_UM, inner)
    assert window is not None
    if crushed:
        window = replace(window, x=window.x + 1.5 * window.texture("fold"), y=window.y + 1.5 * window.texture("warp"))
    cells.draw(window, cell, touching)
    return develop(slide.dye_DHW, look, tiles, defocus, camera)


def _red_cells(
    slide: Canvas, cell: Cell, crowding: float, rng: np.random.Generator
) -> list[tuple[float, float, float]]:
    """Scatter red cells and a few platelets; returns the red cells that a reactive cell in the middle touches."""
    radius, half = cell.diameter_um / 2, slide.half_um + 2.5
    red = styles().red_cell_diameter_um[0] / 2
    placed: list[tuple[float, float]] = []
    touching = []
    turn = rng.uniform(-math.pi, math.pi)
    for i in range(int(rng.integers(1, 4))):
        reach, angle = radius + red - rng.uniform(0.3, 1.5), turn + i * 2.1 + rng.normal(0, 0.2)
        if cell.has("reactive_cytoplasm"):
            placed.append(shapes.polar(angle, reach))
            touching.append((*placed[-1], red))
    keep_off = radius * (0.97 if cell.type in debris.DRAWN else 1.0) + red - 0.4
    spots = rng.uniform(-half, half, (int(10 + 50 * crowding), 2)).tolist()
    for x, y in spots:
        near = 2 * red * rng.uniform(0.80, 1.05)
        if math.hypot(x, y) > keep_off and all(math.hypot(x - a, y - b) > near for a, b in placed):
            placed.append((x, y))
    thickness = np.zeros(slide.dye_DHW.shape[1:], np.float32)
    sprites = _red_sprites(slide.microns_per_px)
    for x, y in placed:
        _stamp(thickness, sprites[int(rng.integers(NUM_RED_SPRITES))], x, y, slide.microns_per_px)
    for dye, amount in zip(slide.dye_DHW, styles().red_cell, strict=True):
        if amount:
            dye += amount * thickness
    for _ in range(int(rng.poisson(0.5))):
        x, y = rng.uniform(-half, half, 2).tolist()
        if math.hypot(x, y) > radius + 2.2 and (window := slide.window(x, y, 2.8, rng)):
            debris.platelet(window, 0.0, 0.0, rng.uniform(0.9, 1.5))
    return touching


def _neighbour(slide: Canvas, rng: np.random.Generator) -> None:
    """Part of another leucocyte at the picture's border."""
    kind = ("NEUT_SEG", "LYMPH", "NEUT_SEG", "MYELO")[int(rng.integers(4))]
    diameter = rng.normal(*styles().types[kind].diameter_um)
    angle, reach = rng.uniform(-math.pi, math.pi), slide.half_um + diameter / 2 - rng.uniform(1.0, 3.5)
    x, y = shapes.polar(angle, reach)
    if window := slide.window(x, y, diameter / 2 + 1.5, rng):
        shape = {"nucleus_shape": "segmented-multilobed"} if kind == "NEUT_SEG" else {}
        cells.draw(window, Cell(kind, diameter, shape))


def _stamp(thickness: shapes.Field, sprite: shapes.Field, x: float, y: float, microns_per_px: float) -> None:
    """Add a sprite centred at (x, y) µm from the middle, cut off at the border."""
    size, span = thickness.shape[0], sprite.shape[0]
    left, top = round(size / 2 + x / microns_per_px - span / 2), round(size / 2 + y / microns_per_px - span / 2)
    x0, x1, y0, y1 = max(left, 0), min(left + span, size), max(top, 0), min(top + span, size)
    if x0 < x1 and y0 < y1:
        thickness[y0:y1, x0:x1] += sprite[y0 - top : y1 - top, x0 - left : x1 - left]


@cache
def _red_sprites(microns_per_px: float) -> list[shapes.Field]:
    """Red cells as thickness, about 1 at the rim and less in the central pallor."""
    rng, tiles = np.random.default_rng(7), textures(microns_per_px)
    span = math.ceil(9.6 / microns_per_px)
    sprites = []
    for _ in range(NUM_RED_SPRITES):
        window = canvas.blank(span, microns_per_px, tiles).window(0, 0, 4.8, rng)
        assert window is not None
        radius, stretch = rng.normal(*styles().red_cell_diameter_um) / 2, math.exp(rng.normal(0, 0.06))
        x, y = window.warped(rng.uniform(0.1, 0.3))
        body = shapes.ellipse(x, y, 0, 0, radius * stretch, radius / stretch, rng.uniform(0, math.pi))
        rho = np.maximum(body + radius, 0) * (1 / radius)
        pallor = rng.uniform(0.3, 0.95) * np.exp(-np.square(rho / rng.uniform(0.38, 0.56)))
        rim = 0.12 * np.exp(-np.square((body + 0.5) / 0.45))
        sprites.append((shapes.coverage(body, 0.3) * (0.95 - pallor + rim)).astype(np.float32))
    return sprites
