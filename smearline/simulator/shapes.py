"""Shapes as signed distances in micrometres: negative inside, positive outside (formulae after Quilez, '2D SDFs').

Coordinates `x` and `y` are float32 arrays of one broadcastable shape; every scalar is a Python float, so that nothing
is widened to float64.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]


def polar(angle: float, reach: float) -> tuple[float, float]:
    """The point at an angle (radians) and a distance from the origin."""
    return reach * math.cos(angle), reach * math.sin(angle)


def disc(x: Field, y: Field, cx: float, cy: float, radius: float) -> Field:
    return np.sqrt(np.square(x - cx) + np.square(y - cy)) - radius


def ellipse(x: Field, y: Field, cx: float, cy: float, a: float, b: float, angle: float) -> Field:
    """Half axes `a` and `b`; exact on the outline, nearly so close to it."""
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = (x - cx) * (cos / a) + (y - cy) * (sin / a), (y - cy) * (cos / b) - (x - cx) * (sin / b)
    return (np.sqrt(u * u + v * v) - 1.0) * min(a, b)


def capsule(x: Field, y: Field, start: tuple[float, float], end: tuple[float, float], radius: float) -> Field:
    """A rod with round ends from `start` to `end`."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    px, py = x - start[0], y - start[1]
    along = np.clip((px * dx + py * dy) / max(dx * dx + dy * dy, 1e-6), 0.0, 1.0)
    return np.sqrt(np.square(px - along * dx) + np.square(py - along * dy)) - radius


def sausage(x: Field, y: Field, bend: float, half_arc: float, thickness: float, angle: float) -> Field:
    """A sausage bent along a circle of radius `bend` about the origin, `half_arc` radians to each side of `angle`."""
    cos, sin = math.cos(angle), math.sin(angle)
    u, v = np.abs(y * cos - x * sin), x * cos + y * sin
    end_u, end_v = math.sin(half_arc), math.cos(half_arc)
    beyond = end_v * u > end_u * v
    to_end = np.sqrt(np.square(u - end_u * bend) + np.square(v - end_v * bend))
    return np.where(beyond, to_end, np.abs(np.sqrt(u * u + v * v) - bend)) - thickness


def union(a: Field, b: Field, blend: float) -> Field:
    """Both shapes; `blend` µm of flesh where they meet."""
    h = np.maximum(blend - np.abs(a - b), 0.0)
    return np.minimum(a, b) - h * h * (0.25 / blend)


def without(a: Field, b: Field) -> Field:
    """The first shape with the second cut out of it."""
    return np.maximum(a, -b)


def coverage(distance: Field, edge_um: float) -> Field:
    """Signed distance to a mask in 0..1 whose edge is `edge_um` wide."""
    return np.clip(0.5 - distance * (1.0 / edge_um), 0.0, 1.0)
