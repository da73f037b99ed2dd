"""What is no nucleated cell: platelets, smudged nuclei, stain precipitate, clumps and dirt."""

import math
from cmath import rect

import numpy as np

from smearline.simulator.canvas import Window, coverage, disc, ellipse
from smearline.simulator.population import style


def platelet(window: Window, radius: float, centre: complex = 0j) -> None:
    """A granular purple middle in a pale fringe."""
    rng, large = window.rng, radius > 2.5
    looks = style("PLT_LARGE" if large else "PLT")
    xy = window.warped(looks.warp_um * rng.uniform(0.7, 1.4), "warp" if large else "fold")
    stretch = rng.lognormal(0, 0.12)
    body = ellipse(xy, centre, radius * stretch, radius / stretch, rng.uniform(0, math.pi))
    body = body + 0.09 * window.texture("fringe")
    window.paint(coverage(body, 0.4), looks.cytoplasm, 1.0 + 0.2 * window.texture("frost"))
    middle = coverage(body + 0.25 * radius, 0.6 * radius) * rng.uniform(0.6, 1.1)
    grain = 0.4 + 0.8 * window.texture("granules_toxic") + 0.2 * window.texture("fine")
    window.add(middle * np.maximum(grain, 0), (0.12, 0.0, 0.8))


def smudge(window: Window, radius: float) -> None:
    """A burst nucleus: pale, stringy, without an edge or a cytoplasm."""
    rng, (x, y), xy = window.rng, window.xy, window.warped(1.2)
    angle, stretch = rng.uniform(0, math.pi), math.exp(abs(rng.normal(0.1, 0.2)))
    body = ellipse(xy, 0j, radius * 0.9 * stretch, radius * 0.9 / stretch, angle)
    body = body + rng.uniform(0.2, 0.7) * window.texture("fold")
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    strings = np.sin((across + 0.5 * window.texture("warp")) * rng.uniform(3.0, 5.5) + 0.15 * along)
    texture = 1.0 + 0.28 * strings * rng.uniform(0.2, 1.0) + 0.30 * np.tanh(1.5 * window.texture("clump"))
    mask = coverage(body, rng.uniform(0.8, 3.0))
    window.paint(mask, (0.06, 0.05, rng.uniform(0.45, 1.15)), texture)


def artefact(window: Window, radius: float) -> None:
    rng = window.rng
    kind = rng.random()
    if kind < 0.4:  # stain precipitate: dark grains scattered over the field
        body = disc(window.warped(1.2), 0j, radius)
        grains = window.texture("granules_coarse") + window.texture("granules_toxic")
        window.add(coverage(body, radius * 0.9) * grains, (0.0, rng.uniform(0.2, 0.9), rng.uniform(1.0, 1.8)))
    elif kind < 0.75:  # a clump of platelets
        for _ in range(int(rng.integers(6, 12))):
            angle, reach = rng.uniform(-math.pi, math.pi), radius * math.sqrt(rng.random()) * 0.75
            platelet(window, radius=rng.uniform(1.1, 1.7), centre=rect(reach, angle))
    else:  # dirt: opaque, sharp-cornered
        x, y = window.warped(0.9, "fold")
        half, angle = radius * rng.uniform(0.4, 0.7), rng.uniform(0, math.pi)
        u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
        body = np.maximum(np.abs(u) - half * rng.uniform(0.6, 1.3), np.abs(v) - half)
        window.paint(coverage(body, 0.3), (0.6, rng.uniform(0.6, 2.0), rng.uniform(1.4, 2.6)))


DRAWN = {"PLT": platelet, "PLT_LARGE": platelet, "SMUDGE": smudge, "ARTEFACT": artefact}
"""All draw about the window's origin, with a radius in µm."""
