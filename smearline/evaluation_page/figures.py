"""Figures as inline SVG. Every text goes through Markup.format, which escapes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup

from smearline.evaluation_page.wording import count, percent, span
from smearline.vocabulary import load

Json = Mapping[str, Any]
CELL, ROW, LEFT, TOP = 48, 30, 170, 92
SIDE, PAD = 212, 36
DOTS = 230


def _join(parts: Iterable[Markup]) -> Markup:
    return Markup("").join(parts)


def confusion(matrix: Json, scope: str) -> Markup:
    """Rows: labels; columns: predictions; colour: share of the row; text: cells. A frame marks what counts as right."""
    parts = []
    columns = matrix["predicted"]
    for j, code in enumerate(columns):
        x = LEFT + j * CELL + CELL / 2 + 4
        parts.append(Markup('<text transform="translate({} {}) rotate(-50)">{}</text>').format(x, TOP - 8, code))
    for i, (true, counts) in enumerate(zip(matrix["true"], matrix["counts"], strict=True)):
        y, total = TOP + i * ROW, sum(counts)
        parts.append(
            Markup('<text x="{}" y="{:.0f}" text-anchor="end">{} <tspan class="n">n={}</tspan></text>').format(
                LEFT - 8, y + 19, true, count(total)
            )
        )
        for j, (predicted, n) in enumerate(zip(columns, counts, strict=True)):
            share, right = n / total, _is_right(true, predicted)
            parts.append(
                Markup('<rect x="{}" y="{:.1f}" width="{}" height="{}" fill="{}"{}/>').format(
                    LEFT + j * CELL, y, CELL - 2, ROW - 2, _shade(share, right), Markup(' class="right"' * right)
                )
            )
            if n:
                parts.append(
                    Markup('<text x="{}" y="{:.0f}" class="count" fill="{}">{}</text>').format(
                        LEFT + j * CELL + CELL / 2 - 1, y + 19, "#fff" if share > 0.55 else "#1c2733", count(n)
                    )
                )
    width, height = LEFT + len(columns) * CELL + 60, TOP + len(matrix["true"]) * ROW + 8
    label = f"Confusion matrix, {scope}: label by row, prediction by column. The table of confusions says the same."
    return _svg(width, height, label, parts, "confusion")


def _is_right(true: str, predicted: str) -> bool:
    return predicted in load().children(true)


def _shade(share: float, right: bool) -> str:
    dark = (15, 98, 120) if right else (176, 58, 46)
    return "#" + "".join(f"{round(246 + (d - 246) * min(1.0, share**0.6)):02x}" for d in dark)


def reliability(calibration: Json, scope: str) -> Markup:
    """Mean confidence against the share right, a point a bin; on the diagonal a probability means what it says."""
    points = [_at(b["confidence"], b["accuracy"]) for b in calibration["bins"]]
    line = Markup('<polyline points="{}" class="line"/>').format(" ".join(f"{x},{y}" for x, y in points))
    circles = [Markup('<circle cx="{}" cy="{}" r="3.5" class="dot"/>').format(x, y) for x, y in points]
    label = f"Reliability diagram, {scope}: " + "; ".join(
        f"stated {percent(b['confidence'])}, right {percent(b['accuracy'])}" for b in calibration["bins"]
    )
    return _square([line, *circles], "stated probability, %", "right, %", label)


def blast_shares(rows: Iterable[Json]) -> Markup:
    """Labelled against predicted share of blasts, a point a smear; square-root axes, since most shares are small."""
    points = [_at(r["true_share"]["value"] ** 0.5, r["predicted_share"]["value"] ** 0.5) for r in rows]
    circles = [Markup('<circle cx="{}" cy="{}" r="3.5" class="smear"/>').format(x, y) for x, y in points]
    label = f"Share of blasts on {count(len(points), 'smear')}: labelled against predicted; the table gives the numbers"
    return _square(circles, "labelled blasts, %", "predicted blasts, %", label, (0.0, 0.05, 0.2, 0.5, 1.0), root=True)


def _at(x: float, y: float) -> tuple[float, float]:
    return round(PAD + x * SIDE, 1), round(8 + (1 - y) * SIDE, 1)


def _square(
    marks: Iterable[Markup],
    across: str,
    up: str,
    label: str,
    ticks: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    root: bool = False,
) -> Markup:
    parts = [Markup('<rect x="{}" y="8" width="{}" height="{}" class="frame"/>').format(PAD, SIDE, SIDE)]
    for tick in ticks:
        x, y = _at(*(2 * (tick**0.5 if root else tick,)))
        parts.append(Markup('<path d="M{} 8V{}M{} {}H{}" class="grid"/>').format(x, 8 + SIDE, PAD, y, PAD + SIDE))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{:.0f}</text>').format(x, SIDE + 23, 100 * tick))
        parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{:.0f}</text>').format(PAD - 5, y + 4, 100 * tick))
    middle = Markup('text-anchor="middle"')
    parts += [
        Markup('<path d="M{} {}L{} {}" class="diagonal"/>').format(*_at(0, 0), *_at(1, 1)),
        *marks,
        Markup('<text x="{}" y="{}" {}>{}</text>').format(PAD + SIDE / 2, SIDE + 40, middle, across),
        Markup('<text transform="translate(10 {}) rotate(-90)" {}>{}</text>').format(8 + SIDE / 2, middle, up),
    ]
    return _svg(PAD + SIDE + 10, SIDE + 48, label, parts, "square")


def axis() -> Markup:
    """The scale above a column of `dots`."""
    texts = [
        Markup('<text x="{}" y="10" text-anchor="middle">{}</text>').format(_x(v), f"{100 * v:.0f}")
        for v in (0, 0.5, 0.8, 1)
    ]
    return _svg(DOTS, 14, "scale, percent", texts, "dots")


def dots(first: Json, second: Json, names: tuple[str, str] = ("sensitivity", "PPV")) -> Markup:
    """Two estimates with their intervals on a scale of 0 to 100 %: a filled and an open circle."""
    parts = [Markup('<path d="M{} 0V26" class="grid"/>').format(_x(v)) for v in (0, 0.5, 0.8, 1)]
    for y, estimate, kind in ((8, first, "filled"), (18, second, "open")):
        if estimate["value"] is not None:
            parts.append(
                Markup('<path d="M{} {y}H{}" class="bar"/>').format(_x(estimate["low"]), _x(estimate["high"]), y=y)
            )
            parts.append(Markup('<circle cx="{}" cy="{}" r="3.6" class="{}"/>').format(_x(estimate["value"]), y, kind))
    label = "; ".join(f"{n} {percent(e['value'])}, {span(e)}" for n, e in zip(names, (first, second), strict=True))
    return _svg(DOTS, 26, label, parts, "dots")


def _x(value: float) -> float:
    return round(10 + value * (DOTS - 20), 1)


def _svg(width: float, height: float, label: str, parts: Iterable[Markup], kind: str) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}" class="{k}" role="img" '
        'aria-label="{label}"><title>{title}</title>{body}</svg>'
    ).format(
        w=width,
        h=height,
        k=kind,
        label=label,
        title=label.split(":")[0] if kind != "dots" else label,
        body=_join(parts),
    )
