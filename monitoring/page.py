"""The watch page of one site and day: one HTML file that needs nothing from outside."""

from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from monitoring.smears import describe
from monitoring.verdict import Finding, Verdict, limits, number
from smearline.evaluation_page import templates

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 350, 150, 46, 10, 22
_MOST_BARS = 8


def write(verdict: Verdict, smears: pd.DataFrame, reference: pd.DataFrame) -> None:
    """index.html beside the verdict. `smears`: the site's, the window's and those before it."""
    environment = templates("monitoring")
    environment.filters["figure"] = number
    figures = {
        name: _strip(found, reference, smears, verdict.window["first"])
        for name, found in verdict.families.items()
        if found.features and name != "mix"
    }
    # The types that the window or the reference has most of.
    mix = sorted(verdict.families["mix"].features, key=lambda f: -max(f.now, f.reference))
    style = files("smearline.evaluation_page").joinpath("style.css").read_text(encoding="utf-8")
    html = environment.get_template("page.html.j2").render(
        v=verdict, figures=figures, mix=mix[:_MOST_BARS], limits=limits(), style=style
    )
    (verdict.path / "index.html").write_text(html, encoding="utf-8")


def _strip(found: Finding, reference: pd.DataFrame, smears: pd.DataFrame, first: str) -> dict[str, Any]:
    """The family's farthest feature: a dot a smear, the reference's at the left, the site's by day at the right."""
    row = found.worst
    factor = describe(row.name).factor
    here = smears[smears["day"].notna()]
    sides = [side.sort_values("day", na_position="first").dropna(subset=[row.name]) for side in (reference, here)]
    every = np.concatenate([side[row.name].to_numpy(float) for side in sides]) * factor
    low, high = min(every.min(), row.low), max(every.max(), row.high)
    room = (high - low) * 0.06 or 1.0

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low + room) / (high - low + 2 * room)), 1)

    middle, dots = LEFT + (WIDTH - LEFT) * 0.45, []
    for side, start, end in zip(sides, (LEFT, middle), (middle, WIDTH), strict=True):
        for i, (day, value) in enumerate(zip(side["day"], side[row.name] * factor, strict=True)):
            kind = "reference" if side is sides[0] else "before" if day < first else "window"
            dots.append((kind, round(start + (end - start) * (i + 0.5) / len(side), 1), y(value)))
    ticks = [(y(v), f"{v:.{1 if high - low > 5 else 2 if high - low > 0.3 else 3}f}") for v in (low, high)]
    return {
        "row": row,
        "dots": dots,
        "middle": round(middle, 1),
        "ticks": ticks,
        "band": (y(row.high), y(row.low)),
        "reference": y(row.reference),
        "now": y(row.now),
    }
