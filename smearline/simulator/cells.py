"""One nucleated cell from the glass up: cytoplasm, granules, nucleus, inclusions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from smearline.simulator import debris, nuclei, shapes
from smearline.simulator.canvas import Dyes, Window
from smearline.simulator.shapes import Field
from smearline.simulator.styles import Style, styles

EDGE_UM = 0.25


@dataclass(frozen=True)
class Cell:
    """What is to be drawn. `traits` holds the characteristics that apply to the type, by name."""

    type: str
    diameter_um: float
    traits: Mapping[str, str]

    def has(self, trait: str, value: str = "present") -> bool:
        return self.traits.get(trait) == value


def draw(window: Window, cell: Cell, touching: Sequence[tuple[float, float, float]] = ()) -> None:
    """Draw a cell about the window's origin.

    Args:
        touching: red cells (x, y, radius in µm from the cell's centre) around which a reactive cell flows.
    """
    if cell.type in debris.DRAWN:
        debris.draw(window, cell.type, cell.diameter_um / 2)
        return
    rng, style, radius = window.rng, styles().types[cell.type], cell.diameter_um / 2
    body = _outline(window, cell, style, radius, touching)
    mask = shapes.coverage(body, EDGE_UM)
    ground = _cytoplasm(window, cell, style, body, mask)
    _granules(window, cell, style, mask * rng.uniform(0.75, 1.1))
    if cell.has("cytoplasm_vacuole", "yes"):
        _vacuoles(window, mask, radius, rng.uniform(0.6, 1.0))
    share = float(np.clip(rng.normal(*style.nucleus), 0.3, 0.92))
    if "nuclear_cytoplasmic_ratio" in cell.traits and cell.type in ("LYMPH", "MONO", "BASO"):
        share += (0.04 if cell.type == "LYMPH" else 0.11) if cell.has("nuclear_cytoplasmic_ratio", "high") else -0.05
    if cell.has("reactive_cytoplasm") or (cell.has("large_granular") and cell.type == "LYMPH"):
        share *= 0.86
    eccentric = style.eccentric
    if cell.has("auer_rod"):
        share, eccentric = share * 0.88, 0.9
    angle, room = rng.uniform(-math.pi, math.pi), radius * (1 - share) * eccentric * rng.uniform(0.5, 1.15)
    dx, dy = shapes.polar(angle, room)
    inner = replace(window, x=window.x - dx, y=window.y - dy)
    if cell.type == "PLASMA":
        hof = shapes.polar(angle + math.pi, radius * share * 0.95)
        pale = shapes.disc(*inner.warped(0.3), *hof, radius * share * rng.uniform(0.55, 0.75))
        window.paint(shapes.coverage(pale, 1.4) * mask * 0.7, (0.08, 0.30, 0.10))
    nucleus = _nucleus(inner, cell, style, radius, radius * share, mask)
    if cell.type in ("BASO", "PROMYELO"):
        _granules(window, cell, style, mask * nucleus * rng.uniform(0.35, 0.7) * (1.4 if cell.type == "BASO" else 1.0))
    _inclusions(window, cell, mask, nucleus, radius, angle, ground)


def _outline(
    window: Window, cell: Cell, style: Style, radius: float, touching: Sequence[tuple[float, float, float]]
) -> Field:
    rng = window.rng
    irregular = cell.has("cell_shape", "irregular")
    x, y = window.warped(style.warp_um * rng.uniform(0.6, 1.2) + (rng.uniform(0.5, 0.9) if irregular else 0.0))
    stretch = math.exp(abs(rng.normal(0.12 if irregular else 0.0, 0.06)))
    body = shapes.ellipse(x, y, 0, 0, radius * stretch, radius / stretch, rng.uniform(0, math.pi))
    if irregular:
        foot, far = rng.uniform(-math.pi, math.pi), radius * rng.uniform(0.6, 0.9)
        body = shapes.union(body, shapes.disc(x, y, *shapes.polar(foot, far), radius * rng.uniform(0.4, 0.6)), 1.2)
    if cell.has("villous_projections"):
        knots = int(rng.integers(38, 60))
        lengths = np.square(rng.random(knots)) * rng.uniform(0.7, 2.0)
        turn = (np.arctan2(y, x) + math.pi) * (knots / (2 * math.pi))
        hair = np.interp(turn, np.arange(knots + 1), np.append(lengths, lengths[0])).astype(np.float32)
        body = body + 0.35 - hair
    for cx, cy, red in touching:
        body = np.maximum(body, red + 0.15 - np.sqrt(np.square(window.x - cx) + np.square(window.y - cy)))
    return body


def _cytoplasm(window: Window, cell: Cell, style: Style, body: Field, mask: Field) -> Dyes:
    """Ground colour, texture and rim; returns the ground colour."""
    rng = window.rng
    ground = style.cytoplasm
    colour = cell.traits.get("cytoplasm_colour")
    if colour and cell.type in ("LYMPH", "MONO"):
        ground = styles().cytoplasm_colours[colour]
    elif colour and colour != "light blue":
        blue, plain = styles().cytoplasm_colours[colour], style.cytoplasm
        ground = (plain[0], plain[1] + blue[1] * 0.7, plain[2] + blue[2] * 0.9)
    if cell.has("hypogranulation"):
        ground = (0.02, ground[1] * 0.8, 0.0)
    if cell.has("reactive_cytoplasm"):
        ground = (0.0, rng.uniform(0.16, 0.36), 0.02)
    if cell.type == "NRBC":
        ripe = rng.uniform(0.0, 1.0) * (0.6 if cell.has("dysplastic_erythroblast") else 1.0)
        ground = (0.06 + 0.16 * ripe, 0.48 - 0.24 * ripe, 0.06 - 0.06 * ripe)
    strength = math.exp(rng.normal(0, 0.13))
    ground = (ground[0] * strength, ground[1] * strength, ground[2] * strength)
    frosted = cell.has("cytoplasm_texture", "frosted")
    texture = 1.0 + (0.10 if style.granules else 0.06) * window.texture("cloud")
    grain = rng.uniform(0.26, 0.45) if frosted else rng.uniform(0.03, 0.09)
    texture += grain * window.texture("frost")
    if frosted:
        texture += rng.uniform(0.16, 0.30) * window.texture("clump")
    window.paint(mask, ground, texture)
    rim = style.rim + (rng.uniform(0.08, 0.42) if cell.has("reactive_cytoplasm") else 0.0)
    if rim:
        window.add(shapes.coverage(np.abs(body + 0.45) - 0.35, 0.7) * mask, (0.0, rim, rim * 0.15))
    return ground


def _granules(window: Window, cell: Cell, style: Style, mask: Field) -> None:
    """Granules as the characteristics say, or else as the type has them."""
    rng = window.rng
    if cell.has("toxic_granulation"):
        window.add(mask * window.texture("granules_toxic"), (0.05, 0.1, rng.uniform(0.4, 0.95)))
        return
    if cell.has("hypogranulation"):
        return
    if cell.has("large_granular"):
        sparse = np.clip(window.texture("granules_azurophil") - 0.35, 0, 1) * rng.uniform(1.2, 1.7)
        window.add(mask * sparse, (0.25, 0.0, 1.0))
        return
    kind = cell.traits.get("granule_type")
    if kind == "nil" or (kind is None and style.granules is None):
        return
    if kind is None:
        assert style.granules is not None
        tile, amounts = style.granules
    else:
        tile, amounts = styles().granule_tiles[kind], styles().granule_colours[cell.traits["granule_colour"]]
        if cell.type == "BASO":
            amounts = (amounts[0], 0.2, amounts[2] * 1.9)
        elif cell.type == "MONO":
            amounts = (amounts[0] * 0.5, 0.0, amounts[2] * 0.5)
    strength = math.exp(rng.normal(0, 0.15))
    window.add(mask * window.texture(tile), (amounts[0] * strength, amounts[1] * strength, amounts[2] * strength))
    if tile == "granules_round":
        window.add(mask, (amounts[0] * 0.35, 0.0, amounts[2] * 0.3))


def _vacuoles(window: Window, mask: Field, radius: float, strength: float) -> None:
    rng = window.rng
    for _ in range(int(rng.integers(5, 13))):
        angle, reach = rng.uniform(-math.pi, math.pi), radius * rng.uniform(0.62, 0.92)
        hole = shapes.disc(window.x, window.y, *shapes.polar(angle, reach), rng.uniform(0.4, 0.95))
        window.paint(shapes.coverage(hole, 0.3) * mask * strength, (0.0, 0.03, 0.0))


def _nucleus(window: Window, cell: Cell, style: Style, radius: float, nucleus_radius: float, inside: Field) -> Field:
    """Paint the nucleus about the window's origin and return its mask, never beyond the cell."""
    rng = window.rng
    lobes = int(rng.integers(3, 5))
    if cell.has("hypersegmentation"):
        lobes, nucleus_radius = int(rng.integers(5, 8)), nucleus_radius * 1.08
    shape = cell.traits.get("nucleus_shape") or style.shapes[int(rng.integers(len(style.shapes)))]
    megaloblastoid = False
    if cell.has("pseudo_pelger_huet"):
        body = nuclei.pelger(window, nucleus_radius, round_one=shape == "unsegmented-round")
    elif cell.has("dysplastic_erythroblast") and rng.random() < 0.7:
        body = nuclei.budding(window, nucleus_radius * 1.05)
    else:
        megaloblastoid = cell.has("dysplastic_erythroblast")
        nucleus_radius *= 1.25 if megaloblastoid else 1.0
        body = nuclei.outline(window, shape, nucleus_radius, radius, lobes)
    if cell.has("cleaved_or_convoluted_nucleus"):
        body = nuclei.cleaved(window, body, nucleus_radius)
    amount, contrast, clumps = style.chromatin
    if "chromatin_density" in cell.traits:
        loose = cell.has("chromatin_density", "loosely")
        amount *= 0.82 if loose else (1.12 if cell.type == "MONO" else 1.0)
        contrast, clumps = (contrast * 1.25, clumps * 0.4) if loose else (contrast, max(clumps, 0.6))
    if cell.has("pseudo_pelger_huet"):
        amount, contrast = amount * 1.12, contrast * 1.3
    if megaloblastoid:
        amount, contrast, clumps = amount * 0.72, 0.3, 0.5
    gain = nuclei.clock_face(window, nucleus_radius) if cell.type == "PLASMA" else None
    body = np.maximum(body, 0.12 - EDGE_UM / 2 + (0.5 - inside) * EDGE_UM)
    mask = nuclei.fill(window, body, amount * math.exp(rng.normal(0, 0.08)), contrast, clumps, gain)
    if cell.has("prominent_nucleolus"):
        nuclei.nucleoli(window, mask, nucleus_radius, prominent=True, number=int(rng.integers(1, 3)))
    elif cell.type in ("BLAST", "PROMYELO"):
        nuclei.nucleoli(window, mask, nucleus_radius, prominent=False, number=int(rng.integers(0, 4)))
    return mask


def _inclusions(
    window: Window, cell: Cell, mask: Field, nucleus: Field, radius: float, angle: float, ground: Dyes
) -> None:
    """What lies in the cytoplasm opposite the nucleus, or bites into it."""
    rng = window.rng
    free = mask * (1.0 - 0.9 * nucleus)
    away = angle + math.pi + rng.normal(0, 0.5)
    if cell.has("dohle_body"):
        for _ in range(int(rng.integers(1, 4))):
            at, reach = rng.uniform(-math.pi, math.pi), radius * rng.uniform(0.76, 0.84)
            half_axes = (rng.uniform(1.0, 1.7), rng.uniform(0.7, 1.05))
            patch = shapes.ellipse(*window.warped(0.15, "fold"), *shapes.polar(at, reach), *half_axes, at + math.pi / 2)
            window.paint(shapes.coverage(patch, 0.5) * free * 0.9, (0.0, rng.uniform(0.55, 0.85), 0.06))
    if cell.has("auer_rod"):
        for _ in range(1 if rng.random() < 0.7 else 3):
            tilt = away + math.pi / 2 + rng.normal(0, 0.6)
            half, reach = rng.uniform(1.3, 2.2), radius * rng.uniform(0.62, 0.78)
            cx, cy = shapes.polar(away, reach)
            dx, dy = shapes.polar(tilt, half)
            rod = shapes.capsule(window.x, window.y, (cx - dx, cy - dy), (cx + dx, cy + dy), rng.uniform(0.13, 0.22))
            clear = shapes.coverage(rod - 0.35, 0.4) * mask * 0.5
            window.paint(clear, ground)
            window.paint(shapes.coverage(rod, 0.2) * mask, (0.95, 0.0, 0.95))
    if cell.has("cup_like_nucleus"):
        reach, size = radius * rng.uniform(0.35, 0.6), radius * rng.uniform(0.28, 0.42)
        at = rng.uniform(-math.pi, math.pi)
        cup = shapes.ellipse(*window.warped(0.2), *shapes.polar(at, reach), size, size * 0.8, at)
        window.paint(shapes.coverage(cup, 0.5) * mask * rng.uniform(0.75, 0.95), (0.04, 0.42, 0.28))
