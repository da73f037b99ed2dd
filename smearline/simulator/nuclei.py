"""Nuclei: their outline as a signed distance, and the chromatin within."""

from __future__ import annotations

import math

import numpy as np

from smearline.simulator import shapes
from smearline.simulator.canvas import Window
from smearline.simulator.shapes import Field

CHROMATIN_EDGE_UM = 0.22


def outline(window: Window, shape: str, radius: float, cell_radius: float, lobes: int) -> Field:
    """A nucleus of a named shape about the window's origin.

    `radius` is that of a disc of its area, µm; `lobes` counts for segmented shapes alone.

    Raises:
        ValueError: the shape is not known.
    """
    rng = window.rng
    angle = rng.uniform(-math.pi, math.pi)
    x, y = window.warped(rng.uniform(0.15, 0.35))
    if shape == "unsegmented-round":
        stretch = math.exp(rng.normal(0, 0.06))
        return shapes.ellipse(x, y, 0, 0, radius * stretch, radius / stretch, angle)
    if shape in ("shallow", "unsegmented-indented"):
        depth = rng.uniform(0.25, 0.7) if shape == "shallow" else rng.uniform(0.7, 1.3)
        bend = radius * 0.62 * depth
        dx, dy = shapes.polar(angle, bend * 0.6)
        return shapes.sausage(x + dx, y + dy, bend, 1.15, radius * (0.98 - 0.33 * depth), angle)
    if shape == "unsegmented-band":
        bend, half = cell_radius * rng.uniform(0.42, 0.56), rng.uniform(1.1, 2.1)
        thickness = radius**2 / (bend * 2 * half + radius * 0.9) * rng.uniform(0.9, 1.1) * 1.25
        dx, dy = shapes.polar(angle, bend * (0.75 - 0.3 * half))
        return shapes.sausage(x + dx, y + dy, bend, half, thickness, angle)
    if shape in ("segmented-bilobed", "segmented-multilobed"):
        return _lobed(window, x, y, radius, cell_radius, 2 if shape.endswith("bilobed") else max(lobes, 3), angle)
    if shape == "irregular":
        x, y = window.x + 0.45 * window.texture("fold"), window.y + 0.45 * window.texture("fold")
        dx, dy = shapes.polar(angle, radius * rng.uniform(0.35, 0.6))
        return shapes.union(
            shapes.disc(x, y, dx, dy, radius * 0.72), shapes.disc(x, y, -dx, -dy, radius * rng.uniform(0.6, 0.8)), 0.8
        )
    raise ValueError(f"no nucleus of the shape '{shape}' is drawn")


def _lobed(window: Window, x: Field, y: Field, radius: float, cell_radius: float, lobes: int, start: float) -> Field:
    """Lobes along a bow, joined by filaments."""
    rng = window.rng
    lobe = radius / math.sqrt(lobes) * (1.02 if lobes < 5 else 0.92)
    bow = cell_radius * (0.40 if lobes == 2 else 0.50)
    step = 2 * math.asin(min(lobe * rng.uniform(0.95, 1.12) / bow, 1.0))
    step = min(step, 2 * math.pi / lobes)
    body: Field | None = None
    last = (0.0, 0.0)
    for i in range(lobes):
        angle, reach = start + i * step + rng.normal(0, 0.08), bow * rng.uniform(0.72, 1.12)
        centre = shapes.polar(angle, reach)
        stretch = math.exp(rng.normal(0.08, 0.12))
        part = shapes.ellipse(x, y, *centre, lobe * stretch, lobe / stretch, angle + math.pi / 2 + rng.normal(0, 0.4))
        if body is None:
            body = part
        else:
            body = shapes.union(body, part, 0.25)
            body = np.minimum(body, shapes.capsule(x, y, last, centre, rng.uniform(0.18, 0.45)))
        last = centre
    assert body is not None
    return body


def pelger(window: Window, radius: float, *, round_one: bool) -> Field:
    """Pseudo-Pelger-Huet: one small round nucleus, or two round lobes on a thin thread like a pince-nez."""
    rng = window.rng
    x, y = window.warped(0.12)
    if round_one:
        return shapes.ellipse(x, y, 0, 0, radius * 0.86, radius * 0.80, rng.uniform(0, math.pi))
    angle, lobe = rng.uniform(0, math.pi), radius * 0.60
    apart = lobe * rng.uniform(1.12, 1.3)
    one, two = shapes.polar(angle, apart), shapes.polar(angle, -apart)
    lobes = np.minimum(shapes.disc(x, y, *one, lobe), shapes.disc(x, y, *two, lobe * rng.uniform(0.9, 1.05)))
    return np.minimum(lobes, shapes.capsule(x, y, one, two, 0.2))


def cleaved(window: Window, body: Field, radius: float) -> Field:
    """A deep cleft across, or folds all round (convoluted)."""
    rng = window.rng
    if rng.random() < 0.55:
        angle = rng.uniform(-math.pi, math.pi)
        rim = shapes.polar(angle, 1.2 * radius)
        depth = rng.uniform(-0.4, 0.15)
        cut = shapes.capsule(*window.warped(0.3, "fold"), rim, (rim[0] * depth, rim[1] * depth), rng.uniform(0.22, 0.4))
        return shapes.without(body, cut)
    return body + np.maximum(window.texture("clump") * 0.35 + window.texture("fold") * 0.7, -0.2)


def budding(window: Window, radius: float) -> Field:
    """A dysplastic red precursor's nucleus: two unequal nuclei with a bridge, or one with buds and fragments."""
    rng = window.rng
    x, y = window.warped(0.15)
    angle = rng.uniform(-math.pi, math.pi)
    if rng.random() < 0.5:
        one = shapes.polar(angle, radius * 0.75)
        two = (-one[0] * rng.uniform(0.9, 1.2), -one[1] * rng.uniform(0.9, 1.2))
        pair = np.minimum(
            shapes.disc(x, y, *one, radius * 0.72), shapes.disc(x, y, *two, radius * rng.uniform(0.5, 0.7))
        )
        return np.minimum(pair, shapes.capsule(x, y, one, two, 0.22))
    body = shapes.disc(x, y, 0, 0, radius * 0.8)
    for _ in range(int(rng.integers(2, 5))):
        angle += rng.uniform(0.9, 2.0)
        reach = radius * rng.uniform(0.8, 1.25)
        bud = shapes.disc(x, y, *shapes.polar(angle, reach), radius * rng.uniform(0.25, 0.45))
        body = shapes.union(body, bud, 0.15)
    return body


def fill(
    window: Window, body: Field, amount: float, contrast: float, clumps: float, gain: Field | None = None
) -> Field:
    """Paint chromatin into an outline and return its mask.

    `clumps` is the share of coarse clumps (mature) against fine threads (immature); `gain` a further pattern.
    """
    mask = shapes.coverage(body, CHROMATIN_EDGE_UM)
    texture = 1.0 + contrast * (
        clumps * np.tanh(1.5 * window.texture("clump")) * 1.3 + (1 - clumps) * window.texture("fine")
    )
    if gain is not None:
        texture = texture * gain
    texture += 0.12 * shapes.coverage(np.abs(body + 0.2) - 0.1, 0.3)
    window.paint(mask, (0.0, 0.06, amount), texture)
    return mask


def clock_face(window: Window, radius: float) -> Field:
    """Spokes of dark chromatin along the rim, as in plasma cells; multiplies the amount."""
    rng = window.rng
    angle = np.arctan2(window.y, window.x)
    spokes = np.cos(angle * int(rng.integers(6, 9)) + rng.uniform(0, 6.28))
    rho = np.sqrt(np.square(window.x) + np.square(window.y)) * (1 / radius)
    return 1.0 + 0.30 * spokes * np.clip(rho * 2 - 0.6, 0, 1)


def nucleoli(window: Window, mask: Field, radius: float, *, prominent: bool, number: int) -> None:
    """Pale bluish spots within the nucleus; prominent ones are large, clear and ringed with dark chromatin."""
    rng = window.rng
    for _ in range(number):
        angle, reach = rng.uniform(-math.pi, math.pi), radius * rng.uniform(0.0, 0.5)
        size = rng.uniform(0.85, 1.3) if prominent else rng.uniform(0.35, 0.55)
        spot = shapes.disc(*window.warped(0.15, "fold"), *shapes.polar(angle, reach), size)
        strength = rng.uniform(0.65, 0.95) if prominent else rng.uniform(0.15, 0.4)
        if prominent:
            window.add(shapes.coverage(np.abs(spot - 0.1) - 0.15, 0.3) * mask, (0.0, 0.0, 0.45))
        window.paint(shapes.coverage(spot, 0.35) * (mask * strength), (0.0, 0.42, 0.40))
