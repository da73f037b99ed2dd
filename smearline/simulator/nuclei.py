"""Nuclei: their outline as a signed distance about the window's origin, and the chromatin within."""

import math
from cmath import rect

import numpy as np

from smearline.simulator.canvas import XY, Field, Window, coverage, disc, ellipse, rod, sausage, union

CHROMATIN_EDGE_UM = 0.22


def outline(window: Window, shape: str, radius: float, cell_radius: float, lobes: int) -> Field:
    """A nucleus of a named shape.

    `radius` is that of a disc of its area, µm; `lobes` counts for segmented shapes alone.

    Raises:
        ValueError: the shape is not known.
    """
    rng = window.rng
    angle = rng.uniform(-math.pi, math.pi)
    xy = window.warped(rng.uniform(0.15, 0.35))
    if shape == "unsegmented-round":
        stretch = rng.lognormal(0, 0.06)
        return ellipse(xy, 0j, radius * stretch, radius / stretch, angle)
    if shape in ("shallow", "unsegmented-indented"):
        depth = rng.uniform(0.25, 0.7) if shape == "shallow" else rng.uniform(0.7, 1.3)
        bend = radius * 0.62 * depth
        return sausage(xy, -rect(bend * 0.6, angle), bend, 1.15, radius * (0.98 - 0.33 * depth), angle)
    if shape == "unsegmented-band":
        bend, half = cell_radius * rng.uniform(0.42, 0.56), rng.uniform(1.1, 2.1)
        thickness = radius**2 / (bend * 2 * half + radius * 0.9) * rng.uniform(0.9, 1.1) * 1.25
        return sausage(xy, -rect(bend * (0.75 - 0.3 * half), angle), bend, half, thickness, angle)
    if shape in ("segmented-bilobed", "segmented-multilobed"):
        return _lobed(window, xy, radius, cell_radius, 2 if shape.endswith("bilobed") else max(lobes, 3), angle)
    if shape == "irregular":
        xy = window.warped(0.45, "fold")
        off = rect(radius * rng.uniform(0.35, 0.6), angle)
        return union(disc(xy, off, radius * 0.72), disc(xy, -off, radius * rng.uniform(0.6, 0.8)), 0.8)
    raise ValueError(f"no nucleus of the shape '{shape}' is drawn")


def _lobed(window: Window, xy: XY, radius: float, cell_radius: float, lobes: int, start: float) -> Field:
    """Lobes along a bow, joined by filaments."""
    rng = window.rng
    lobe = radius / math.sqrt(lobes) * (1.02 if lobes < 5 else 0.92)
    bow = cell_radius * (0.40 if lobes == 2 else 0.50)
    step = min(2 * math.asin(min(lobe * rng.uniform(0.95, 1.12) / bow, 1.0)), 2 * math.pi / lobes)
    last, body = 0j, xy[0]
    for i in range(lobes):
        angle, reach = start + i * step + rng.normal(0, 0.08), bow * rng.uniform(0.72, 1.12)
        centre, stretch = rect(reach, angle), rng.lognormal(0.08, 0.12)
        part = ellipse(xy, centre, lobe * stretch, lobe / stretch, angle + math.pi / 2 + rng.normal(0, 0.4))
        body = np.minimum(union(body, part, 0.25), rod(xy, last, centre, rng.uniform(0.18, 0.45))) if i else part
        last = centre
    return body


def pelger(window: Window, radius: float, *, round_one: bool) -> Field:
    """Pseudo-Pelger-Huet: one small round nucleus, or two round lobes on a thin thread like a pince-nez."""
    rng = window.rng
    xy = window.warped(0.12)
    if round_one:
        return ellipse(xy, 0j, radius * 0.86, radius * 0.80, rng.uniform(0, math.pi))
    angle, lobe = rng.uniform(0, math.pi), radius * 0.60
    one = rect(lobe * rng.uniform(1.12, 1.3), angle)
    lobes = np.minimum(disc(xy, one, lobe), disc(xy, -one, lobe * rng.uniform(0.9, 1.05)))
    return np.minimum(lobes, rod(xy, one, -one, 0.2))


def cleaved(window: Window, body: Field, radius: float) -> Field:
    """A deep cleft across, or folds all round (convoluted)."""
    rng = window.rng
    if rng.random() < 0.55:
        rim = rect(1.2 * radius, rng.uniform(-math.pi, math.pi))
        depth = rng.uniform(-0.4, 0.15)
        return np.maximum(body, -rod(window.warped(0.3, "fold"), rim, rim * depth, rng.uniform(0.22, 0.4)))
    return body + np.maximum(window.texture("clump") * 0.35 + window.texture("fold") * 0.7, -0.2)


def budding(window: Window, radius: float) -> Field:
    """A dysplastic red precursor's nucleus: two unequal nuclei with a bridge, or one with buds and fragments."""
    rng = window.rng
    xy = window.warped(0.15)
    angle = rng.uniform(-math.pi, math.pi)
    if rng.random() < 0.5:
        one = rect(radius * 0.75, angle)
        two = complex(-one.real * rng.uniform(0.9, 1.2), -one.imag * rng.uniform(0.9, 1.2))
        pair = np.minimum(disc(xy, one, radius * 0.72), disc(xy, two, radius * rng.uniform(0.5, 0.7)))
        return np.minimum(pair, rod(xy, one, two, 0.22))
    body = disc(xy, 0j, radius * 0.8)
    for _ in range(int(rng.integers(2, 5))):
        angle += rng.uniform(0.9, 2.0)
        reach = radius * rng.uniform(0.8, 1.25)
        body = union(body, disc(xy, rect(reach, angle), radius * rng.uniform(0.25, 0.45)), 0.15)
    return body


def fill(window: Window, body: Field, amount: float, contrast: float, clumps: float, gain: Field | float) -> Field:
    """Paint chromatin into an outline and return its mask.

    `clumps` is the share of coarse clumps (mature) against fine threads (immature); `gain` a further pattern.
    """
    mask = coverage(body, CHROMATIN_EDGE_UM)
    coarse, fine = np.tanh(1.5 * window.texture("clump")), window.texture("fine")
    texture = (1.0 + contrast * (clumps * coarse * 1.3 + (1 - clumps) * fine)) * gain
    texture += 0.12 * coverage(np.abs(body + 0.2) - 0.1, 0.3)
    window.paint(mask, (0.0, 0.06, amount), texture)
    return mask


def clock_face(window: Window, radius: float) -> Field:
    """Spokes of dark chromatin along the rim, as in plasma cells; multiplies the amount."""
    x, y = window.xy
    spokes = np.cos(np.arctan2(y, x) * int(window.rng.integers(6, 9)) + window.rng.uniform(0, 6.28))
    return 1.0 + 0.30 * spokes * np.clip(disc(window.xy, 0j, 0.0) * (1 / radius) * 2 - 0.6, 0, 1)


def nucleoli(window: Window, mask: Field, radius: float, *, prominent: bool) -> None:
    """Pale bluish spots within the nucleus; prominent ones are large, clear and ringed with dark chromatin."""
    rng = window.rng
    for _ in range(int(rng.integers(1, 3) if prominent else rng.integers(0, 4))):
        angle, reach = rng.uniform(-math.pi, math.pi), radius * rng.uniform(0.0, 0.5)
        size = rng.uniform(0.85, 1.3) if prominent else rng.uniform(0.35, 0.55)
        spot = disc(window.warped(0.15, "fold"), rect(reach, angle), size)
        strength = rng.uniform(0.65, 0.95) if prominent else rng.uniform(0.15, 0.4)
        if prominent:
            window.add(coverage(np.abs(spot - 0.1) - 0.15, 0.3) * mask, (0.0, 0.0, 0.45))
        window.paint(coverage(spot, 0.35) * (mask * strength), (0.0, 0.42, 0.40))
