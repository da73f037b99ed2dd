"""The evaluation of a recogniser as one page that a haematologist and a quality manager can read and file.

metrics.json as one self-contained HTML file: no script, font or image comes from outside. What it says and how it looks
stands in the templates (autoescaped) beside this module.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from smearline.metrics.blasts import MANY
from smearline.vocabulary import load

Json = dict[str, Any]
MOST_SMEARS = 25
MOST_CONFUSIONS = 12


def templates(package: str) -> Environment:
    """The templates beside a package's modules: what they are given is escaped, and an unknown name is an error."""
    return Environment(
        loader=PackageLoader(package, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(metrics: Json, *, title: str, examples: Sequence[Json], out: Path) -> None:
    """Write the page.

    Args:
        metrics: what `smearline.metrics.evaluate` gave, or metrics.json read back.
        title: of the page, such as the model's name and version.
        examples: the most confident errors, shown in the order given: data_uri (a picture), site, true_type, predicted_type,
            probability, sha256_prefix.
        out: the HTML file; its folder must exist.
    """
    environment = templates(__name__)
    environment.filters |= {f.__name__.strip("_"): f for f in (_count, _percent, _span, _decimal, _name, _listed)}
    environment.globals |= {"children": load().children, "shade": _shade, "top_confusions": _top_confusions}
    environment.globals |= {"learning_lines": _learning_lines, "adaptation_lines": _adaptation_lines}
    page = environment.get_template("page.html.j2").render(
        m=metrics,
        title=title,
        examples=examples,
        scopes=_scopes(metrics),
        tested={n: c for n, c in metrics["characteristics"].items() if c["status"] == "tested"},
        shown_smears=_shown_smears(metrics["blast"]["smears"].get("rows", [])),
    )
    out.write_text(page, encoding="utf-8")


def _scopes(metrics: Json) -> list[Json]:
    """What is shown once for all sites together and, where there are several, once for each site."""
    parts = ("types", "parents", "confusion", "calibration", "blast", "sureness")
    sites = [
        {"title": f"Site {site}", "counts": counts} | {p: metrics[p]["by_site"][site] for p in parts}
        for site, counts in metrics["counts"]["by_site"].items()
        if site in metrics["types"]["by_site"]
    ]
    together = {"title": "All sites", "counts": metrics["counts"]} | {p: metrics[p]["overall"] for p in parts}
    return [together, *sites] if len(sites) > 1 else [together | {"title": sites[0]["title"]}]


Line = list[tuple[float, float, str]]
"""(place across 0..1, share, what stands below) of each point."""


def _learning_lines(points: Sequence[Json]) -> list[Line]:
    """Share of right names, of all cells and the mean over the types, by the cells trained on: means over the seeds."""
    shares: dict[float, list[Json]] = {}
    for point in points:
        shares.setdefault(point["share"], []).append(point)
    names = ("val_accuracy", "val_balanced_accuracy")
    return _lines(
        [{round(fmean(p["cells"] for p in g)): fmean(p[name] for p in g) for g in shares.values()} for name in names]
    )


def _adaptation_lines(rows: Sequence[Json]) -> list[Line]:
    """Share of right names at the new site and at home (empty where none was judged), by the labels of the new site."""
    adapted = [row for row in rows if row["model"] == "adapted"]
    return _lines(
        [{r["labels"]: r["accuracy"] for r in adapted if r["where"] == name} for name in ("the new site", "home")]
    )


def _lines(found: list[dict[int, float]]) -> list[Line]:
    """Of share by number; the places by the logarithm of 1 and the number."""
    ends = [math.log1p(end({n for points in found for n in points})) for end in (min, max)]
    width = max(ends[1] - ends[0], 1e-9)
    return [
        [(0.05 + 0.9 * (math.log1p(n) - ends[0]) / width, share, f"{n:,}") for n, share in sorted(points.items())]
        for points in found
    ]


def _shown_smears(rows: Sequence[Json]) -> list[Json]:
    """Smears on which blasts were missed or wrongly seen, then those with most labelled blasts."""

    def ranked(row: Json) -> tuple[int, str]:
        true, predicted = row["true_share"]["value"], row["predicted_share"]["value"]
        if true and not predicted:
            return 0, "all missed"
        if (true >= MANY) != (predicted >= MANY):
            return (1, "5 % reached by the label only") if true >= MANY else (2, "5 % reached by the recogniser only")
        return (3, "") if true else (2, "seen where none is labelled")

    found = [
        (rank, -row["true_share"]["value"], -row["predicted_share"]["value"], row["site"], row["smear"], finding, row)
        for row in rows
        if row["true_blasts"] or row["predicted_blasts"]
        for rank, finding in [ranked(row)]
    ]
    return [row | {"finding": finding} for *_, finding, row in sorted(found)[:MOST_SMEARS]]


def _top_confusions(confusion: Json) -> list[Json]:
    """The most frequent wrong answers: true, predicted, cells, share of the label's cells, tolerated or not."""
    types, rows = load().types, []
    for true, counts in zip(confusion["true"], confusion["counts"], strict=True):
        children = load().children(true)
        for predicted, n in zip(confusion["predicted"], counts, strict=True):
            if n and predicted not in children:
                near = all(predicted in types[c].neighbours for c in children)
                rows.append({"true": true, "predicted": predicted, "n": n, "share": n / sum(counts), "near": near})
    return sorted(rows, key=lambda r: (-r["n"], r["true"], r["predicted"]))[:MOST_CONFUSIONS]


def _shade(share: float, right: bool) -> str:
    """The deeper, the larger the share; teal where right, red where wrong."""
    dark = (15, 98, 120) if right else (176, 58, 46)
    return "#" + "".join(f"{round(246 + (d - 246) * min(1.0, share**0.6)):02x}" for d in dark)


def _count(value: int, noun: str = "") -> str:
    """1234, 'cell' to '1,234 cells'."""
    return f"{value:,}" + (f" {noun}{'' if value == 1 else 's'}" if noun else "")


def _percent(value: float | None, unit: str = "\N{NO-BREAK SPACE}%") -> str:
    """0.9661 to '96.6 %' (its space does not break). What is not quite all or nothing is never rounded to it."""
    if value is None:
        return "–"
    text = f"{100 * value:.1f}"
    text = ">99.9" if text == "100.0" and value < 1 else "<0.1" if text == "0.0" and value > 0 else text
    return text + unit


def _span(estimate: Json) -> str:
    """The interval of an estimate: '95.8 to 97.4'."""
    if estimate["low"] is None:
        return ""
    return f"{_percent(estimate['low'], '')} to {_percent(estimate['high'], '')}"


def _decimal(value: float | None) -> str:
    if value is None:
        return "–"
    return ">0.999" if value < 1 and f"{value:.3f}" == "1.000" else f"{value:.3f}"


def _name(code: str) -> str:
    """'NEUT_SEG' to 'segmented neutrophil'; a characteristic to its words."""
    return load().names.get(code, code.replace("_", " "))


def _listed(words: Sequence[str]) -> str:
    """'a, b and c'."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]])) or "none"
