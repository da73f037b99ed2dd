"""The watch page of one site and day: one HTML file that needs nothing from outside."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from monitoring.drift import Feature
from monitoring.smears import describe
from monitoring.verdict import Finding, Verdict, limits, number

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 350, 150, 46, 10, 22
_MOST_BARS = 8


def write(verdict: Verdict, smears: pd.DataFrame, reference: pd.DataFrame) -> None:
    """index.html beside the verdict. `smears`: the site's, the window's and those before it."""
    environment = Environment(
        loader=PackageLoader("monitoring", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = number
    figures = {
        name: _strip(found, reference, smears, verdict.window["first"])
        for name, found in verdict.families.items()
        if found.features and name != "mix"
    }
    style = files("smearline.evaluation_page").joinpath("style.css").read_text(encoding="utf-8")
    html = environment.get_template("page.html.j2").render(
        v=verdict, figures=figures, mix=_bars(verdict.families["mix"]), limits=limits(), style=style
    )
    (verdict.path / "index.html").write_text(html, encoding="utf-8")


def _strip(found: Finding, reference: pd.DataFrame, smears: pd.DataFrame, first: str) -> dict[str, Any]:
    """The family's farthest feature: a dot a smear, the reference's at the left, the site's by day at the right."""
    row = found.worst
    factor = describe(row.name).factor
    series = [
        (k, s.sort_values("day", na_position="first")[row.name].dropna() * factor)
        for k, s in (
            ("reference", reference),
            ("before", smears[smears["day"] < first]),
            ("window", smears[smears["day"] >= first]),
        )
    ]
    every = np.concatenate([s.to_numpy(float) for _, s in series])
    low, high = min(every.min(), row.low), max(every.max(), row.high)
    room = (high - low) * 0.06 or 1.0

    def y(value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low + room) / (high - low + 2 * room)), 1)

    middle, dots = LEFT + (WIDTH - LEFT) * 0.45, []
    later = len(series[1][1]) + len(series[2][1])
    for kind, values in series:
        start, span = (LEFT, middle - LEFT) if kind == "reference" else (middle, WIDTH - middle)
        skip, total = (0, len(values)) if kind != "window" else (later - len(values), later)
        total = later if kind == "before" else total
        dots += [(kind, round(start + span * (i + skip + 0.5) / total, 1), y(v)) for i, v in enumerate(values)]
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


def _bars(mix: Finding) -> list[Feature]:
    """The types that the window or the reference has most of."""
    return sorted(mix.features, key=lambda f: -max(f.now, f.reference))[:_MOST_BARS]
