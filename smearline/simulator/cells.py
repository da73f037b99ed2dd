"""One cell from the glass up: cytoplasm, granules, nucleus, inclusions."""

import math
from cmath import rect
from collections.abc import Sequence

import numpy as np

from smearline.simulator import debris, nuclei
from smearline.simulator.canvas import Dyes, Field, Window, coverage, disc, ellipse, rod, union
from smearline.simulator.population import Cell, style, tables

EDGE_UM = 0.25


def draw(window: Window, cell: Cell, touching: Sequence[complex] = ()) -> None:
    """Draw a cell about the window's origin; a reactive one flows around the red cells at `touching`."""
    rng, looks, radius = window.rng, style(cell.type), cell.diameter_um / 2
    if cell.type in debris.DRAWN:
        debris.DRAWN[cell.type](window, radius)
        return
    body = _outline(window, cell, radius, touching)
    mask = coverage(body, EDGE_UM)
    ground = _cytoplasm(window, cell, body, mask)
    _granules(window, cell, mask * rng.uniform(0.75, 1.1))
    if cell.has("cytoplasm_vacuole", "yes"):
        _vacuoles(window, mask, radius, rng.uniform(0.6, 1.0))
    share = float(np.clip(rng.normal(*looks.nucleus), 0.3, 0.92))
    if "nuclear_cytoplasmic_ratio" in cell.traits and cell.type in ("LYMPH", "MONO", "BASO"):
        share += (0.04 if cell.type == "LYMPH" else 0.11) if cell.has("nuclear_cytoplasmic_ratio", "high") else -0.05
    if cell.has("reactive_cytoplasm") or (cell.has("large_granular") and cell.type == "LYMPH"):
        share *= 0.86
    eccentric = looks.eccentric
    if cell.has("auer_rod"):
        share, eccentric = share * 0.88, 0.9
    angle = rng.uniform(-math.pi, math.pi)
    inner = window.about(rect(radius * (1 - share) * eccentric * rng.uniform(0.5, 1.15), angle))
    if cell.type == "PLASMA":
        hof = rect(radius * share * 0.95, angle + math.pi)
        pale = disc(inner.warped(0.3), hof, radius * share * rng.uniform(0.55, 0.75))
        window.paint(coverage(pale, 1.4) * mask * 0.7, (0.08, 0.30, 0.10))
    nucleus = _nucleus(inner, cell, radius, radius * share, mask)
    if cell.type in ("BASO", "PROMYELO"):
        _granules(window, cell, mask * nucleus * rng.uniform(0.35, 0.7) * (1.4 if cell.type == "BASO" else 1.0))
    _inclusions(window, cell, mask, nucleus, radius, angle + math.pi, ground)


def _outline(window: Window, cell: Cell, radius: float, touching: Sequence[complex]) -> Field:
    rng = window.rng
    irregular = cell.has("cell_shape", "irregular")
    wander = style(cell.type).warp_um * rng.uniform(0.6, 1.2) + (rng.uniform(0.5, 0.9) if irregular else 0.0)
    xy = window.warped(wander)
    stretch = math.exp(abs(rng.normal(0.12 if irregular else 0.0, 0.06)))
    body = ellipse(xy, 0j, radius * stretch, radius / stretch, rng.uniform(0, math.pi))
    if irregular:
        foot, far = rng.uniform(-math.pi, math.pi), radius * rng.uniform(0.6, 0.9)
        body = union(body, disc(xy, rect(far, foot), radius * rng.uniform(0.4, 0.6)), 1.2)
    if cell.has("villous_projections"):
        knots = int(rng.integers(38, 60))
        lengths = np.square(rng.random(knots)) * rng.uniform(0.7, 2.0)
        turn = (np.arctan2(xy[1], xy[0]) + math.pi) * (knots / (2 * math.pi))
        hair = np.interp(turn, np.arange(knots), lengths, period=knots).astype(np.float32)
        body = body + 0.35 - hair
    for centre in touching:
        body = np.maximum(body, tables("styles")["red_cell_diameter_um"][0] / 2 + 0.15 - disc(window.xy, centre, 0.0))
    return body


def _cytoplasm(window: Window, cell: Cell, body: Field, mask: Field) -> Dyes:
    """Ground colour, texture and rim; returns the ground colour."""
    rng, looks = window.rng, style(cell.type)
    ground = np.array(looks.cytoplasm, float)
    if colour := cell.traits.get("cytoplasm_colour"):
        named = np.array(tables("styles")["cytoplasm_colours"][colour])
        if cell.type in ("LYMPH", "MONO"):
            ground = named
        elif colour != "light blue":
            ground = ground + named * (0.0, 0.7, 0.9)
    if cell.has("hypogranulation"):
        ground = np.array([0.02, ground[1] * 0.8, 0.0])
    if cell.has("reactive_cytoplasm"):
        ground = np.array([0.0, rng.uniform(0.16, 0.36), 0.02])
    if cell.type == "NRBC":
        ripe = rng.uniform(0.0, 1.0) * (0.6 if cell.has("dysplastic_erythroblast") else 1.0)
        ground = np.array([0.06 + 0.16 * ripe, 0.48 - 0.24 * ripe, 0.06 - 0.06 * ripe])
    ground = ground * rng.lognormal(0, 0.13)
    frosted = cell.has("cytoplasm_texture", "frosted")
    texture = 1.0 + (0.10 if looks.granules else 0.06) * window.texture("cloud")
    grain = rng.uniform(0.26, 0.45) if frosted else rng.uniform(0.03, 0.09)
    texture += grain * window.texture("frost")
    if frosted:
        texture += rng.uniform(0.16, 0.30) * window.texture("clump")
    window.paint(mask, ground, texture)
    rim = looks.rim + (rng.uniform(0.08, 0.42) if cell.has("reactive_cytoplasm") else 0.0)
    if rim:
        window.add(coverage(np.abs(body + 0.45) - 0.35, 0.7) * mask, (0.0, rim, rim * 0.15))
    return ground


def _granules(window: Window, cell: Cell, mask: Field) -> None:
    """Granules as the characteristics say, or else as the type has them."""
    rng, kind, own = window.rng, cell.traits.get("granule_type"), style(cell.type).granules
    if cell.has("toxic_granulation"):
        window.add(mask * window.texture("granules_toxic"), (0.05, 0.1, rng.uniform(0.4, 0.95)))
        return
    if cell.has("large_granular"):
        sparse = np.clip(window.texture("granules_azurophil") - 0.35, 0, 1) * rng.uniform(1.2, 1.7)
        window.add(mask * sparse, (0.25, 0.0, 1.0))
        return
    if cell.has("hypogranulation") or kind == "nil" or not (kind or own):
        return
    if kind:
        colour = tables("styles")["granule_colours"][cell.traits["granule_colour"]]
        own = tables("styles")["granule_tiles"][kind], colour
    assert own is not None
    tile, (eosin, azure, purple) = own
    if kind and cell.type == "BASO":
        azure, purple = 0.2, purple * 1.9
    elif kind and cell.type == "MONO":
        eosin, azure, purple = eosin * 0.5, 0.0, purple * 0.5
    strength = rng.lognormal(0, 0.15)
    window.add(mask * window.texture(tile), (eosin * strength, azure * strength, purple * strength))
    if tile == "granules_round":
        window.add(mask, (eosin * 0.35, 0.0, purple * 0.3))


def _vacuoles(window: Window, mask: Field, radius: float, strength: float) -> None:
    rng = window.rng
    for _ in range(int(rng.integers(5, 13))):
        angle, reach = rng.uniform(-math.pi, math.pi), radius * rng.uniform(0.62, 0.92)
        hole = disc(window.xy, rect(reach, angle), rng.uniform(0.4, 0.95))
        window.paint(coverage(hole, 0.3) * mask * strength, (0.0, 0.03, 0.0))


def _nucleus(window: Window, cell: Cell, cell_radius: float, radius: float, inside: Field) -> Field:
    """Paint the nucleus about the window's origin and return its mask, never beyond the cell."""
    rng, looks = window.rng, style(cell.type)
    lobes = int(rng.integers(3, 5))
    if cell.has("hypersegmentation"):
        lobes, radius = int(rng.integers(5, 8)), radius * 1.08
    shape = cell.traits.get("nucleus_shape") or looks.shapes[int(rng.integers(len(looks.shapes)))]
    amount, contrast, clumps = looks.chromatin
    if "chromatin_density" in cell.traits:
        loose = cell.has("chromatin_density", "loosely")
        amount *= 0.82 if loose else (1.12 if cell.type == "MONO" else 1.0)
        contrast, clumps = (contrast * 1.25, clumps * 0.4) if loose else (contrast, max(clumps, 0.6))
    if cell.has("pseudo_pelger_huet"):
        body = nuclei.pelger(window, radius, round_one=shape == "unsegmented-round")
        amount, contrast = amount * 1.12, contrast * 1.3
    elif cell.has("dysplastic_erythroblast") and rng.random() < 0.7:
        body = nuclei.budding(window, radius * 1.05)
    else:
        if cell.has("dysplastic_erythroblast"):  # megaloblastoid
            radius, amount, contrast, clumps = radius * 1.25, amount * 0.72, 0.3, 0.5
        body = nuclei.outline(window, shape, radius, cell_radius, lobes)
    if cell.has("cleaved_or_convoluted_nucleus"):
        body = nuclei.cleaved(window, body, radius)
    gain = nuclei.clock_face(window, radius) if cell.type == "PLASMA" else 1.0
    body = np.maximum(body, 0.12 - EDGE_UM / 2 + (0.5 - inside) * EDGE_UM)
    mask = nuclei.fill(window, body, amount * rng.lognormal(0, 0.08), contrast, clumps, gain)
    if cell.has("prominent_nucleolus") or cell.type in ("BLAST", "PROMYELO"):
        nuclei.nucleoli(window, mask, radius, prominent=cell.has("prominent_nucleolus"))
    return mask


def _inclusions(
    window: Window, cell: Cell, mask: Field, nucleus: Field, radius: float, opposite: float, ground: Dyes
) -> None:
    """What lies in the cytoplasm opposite the nucleus, or bites into it."""
    rng = window.rng
    free = mask * (1.0 - 0.9 * nucleus)
    away = opposite + rng.normal(0, 0.5)
    if cell.has("dohle_body"):
        for _ in range(int(rng.integers(1, 4))):
            at, reach = rng.uniform(-math.pi, math.pi), radius * rng.uniform(0.76, 0.84)
            half_axes = (rng.uniform(1.0, 1.7), rng.uniform(0.7, 1.05))
            patch = ellipse(window.warped(0.15, "fold"), rect(reach, at), *half_axes, at + math.pi / 2)
            window.paint(coverage(patch, 0.5) * free * 0.9, (0.0, rng.uniform(0.55, 0.85), 0.06))
    if cell.has("auer_rod"):
        for _ in range(1 if rng.random() < 0.7 else 3):
            tilt = away + math.pi / 2 + rng.normal(0, 0.6)
            half, reach = rng.uniform(1.3, 2.2), radius * rng.uniform(0.62, 0.78)
            middle, end = rect(reach, away), rect(half, tilt)
            needle = rod(window.xy, middle - end, middle + end, rng.uniform(0.13, 0.22))
            window.paint(coverage(needle - 0.35, 0.4) * mask * 0.5, ground)
            window.paint(coverage(needle, 0.2) * mask, (0.95, 0.0, 0.95))
    if cell.has("cup_like_nucleus"):
        reach, size = radius * rng.uniform(0.35, 0.6), radius * rng.uniform(0.28, 0.42)
        at = rng.uniform(-math.pi, math.pi)
        cup = ellipse(window.warped(0.2), rect(reach, at), size, size * 0.8, at)
        window.paint(coverage(cup, 0.5) * mask * rng.uniform(0.75, 0.95), (0.04, 0.42, 0.28))
