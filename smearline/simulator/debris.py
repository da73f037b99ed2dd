"""What is no nucleated cell: platelets, smudged nuclei, stain precipitate, clumps and dirt."""

from __future__ import annotations

import math

import numpy as np

from smearline.simulator import shapes
from smearline.simulator.canvas import Window
from smearline.simulator.styles import styles

DRAWN = ("PLT", "PLT_LARGE", "SMUDGE", "ARTEFACT")


def draw(window: Window, kind: str, radius: float) -> None:
    """Draw one of DRAWN about the window's origin; `radius` in µm."""
    if kind in ("PLT", "PLT_LARGE"):
        platelet(window, 0.0, 0.0, radius)
    elif kind == "SMUDGE":
        _smudge(window, radius)
    else:
        _artefact(window, radius)


def platelet(window: Window, cx: float, cy: float, radius: float) -> None:
    """A granular purple middle in a pale fringe."""
    rng = window.rng
    style = styles().types["PLT_LARGE" if radius > 2.5 else "PLT"]
    x, y = window.warped(style.warp_um * rng.uniform(0.7, 1.4), "warp" if radius > 2.5 else "fold")
    stretch = math.exp(rng.normal(0, 0.12))
    body = shapes.ellipse(x, y, cx, cy, radius * stretch, radius / stretch, rng.uniform(0, math.pi))
    body = body + 0.09 * window.texture("fringe")
    mask = shapes.coverage(body, 0.4)
    window.paint(mask, style.cytoplasm, 1.0 + 0.2 * window.texture("frost"))
    middle = shapes.coverage(body + 0.25 * radius, 0.6 * radius) * rng.uniform(0.6, 1.1)
    grain = 0.4 + 0.8 * window.texture("granules_toxic") + 0.2 * window.texture("fine")
    window.add(middle * np.maximum(grain, 0), (0.12, 0.0, 0.8))


def _smudge(window: Window, radius: float) -> None:
    """A burst nucleus: pale, stringy, without an edge or a cytoplasm."""
    rng = window.rng
    x, y = window.x + 1.2 * window.texture("warp"), window.y + 1.2 * window.texture("warp")
    angle, stretch = rng.uniform(0, math.pi), math.exp(abs(rng.normal(0.1, 0.2)))
    body = shapes.ellipse(x, y, 0, 0, radius * 0.9 * stretch, radius * 0.9 / stretch, angle)
    body = body + rng.uniform(0.2, 0.7) * window.texture("fold")
    along = window.x * math.cos(angle) + window.y * math.sin(angle)
    across = window.y * math.cos(angle) - window.x * math.sin(angle) + 0.5 * window.texture("warp")
    strings = np.sin(across * rng.uniform(3.0, 5.5) + 0.15 * along)
    texture = 1.0 + 0.28 * strings * rng.uniform(0.2, 1.0) + 0.30 * np.tanh(1.5 * window.texture("clump"))
    mask = shapes.coverage(body, rng.uniform(0.8, 3.0))
    window.paint(mask, (0.06, 0.05, rng.uniform(0.45, 1.15)), texture)


def _artefact(window: Window, radius: float) -> None:
    rng = window.rng
    kind = rng.random()
    if kind < 0.4:  # stain precipitate: dark grains scattered over the field
        body = shapes.disc(*window.warped(1.2), 0, 0, radius)
        grains = window.texture("granules_coarse") + window.texture("granules_toxic")
        window.add(shapes.coverage(body, radius * 0.9) * grains, (0.0, rng.uniform(0.2, 0.9), rng.uniform(1.0, 1.8)))
    elif kind < 0.75:  # a clump of platelets
        for _ in range(int(rng.integers(6, 12))):
            angle, reach = rng.uniform(-math.pi, math.pi), radius * math.sqrt(rng.random()) * 0.75
            platelet(window, *shapes.polar(angle, reach), rng.uniform(1.1, 1.7))
    else:  # dirt: opaque, sharp-cornered
        x, y = window.x + 0.9 * window.texture("fold"), window.y + 0.9 * window.texture("fold")
        half, angle = radius * rng.uniform(0.4, 0.7), rng.uniform(0, math.pi)
        u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        body = np.maximum(np.abs(u) - half * rng.uniform(0.6, 1.3), np.abs(v) - half)
        window.paint(shapes.coverage(body, 0.3), (0.6, rng.uniform(0.6, 2.0), rng.uniform(1.4, 2.6)))
