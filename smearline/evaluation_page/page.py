"""Render metrics.json as one self-contained HTML file: no script, font or image comes from outside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from smearline.evaluation_page import figures, wording
from smearline.metrics.blasts import MANY

MOST_SMEARS = 25


@dataclass(frozen=True)
class ErrorExample:
    """A cell that was misnamed with much confidence, as a picture."""

    image_jpeg: bytes
    site: str
    true_type: str
    predicted_type: str
    probability: float
    sha256_prefix: str

    @property
    def data_uri(self) -> str:
        return "data:image/jpeg;base64," + base64.b64encode(self.image_jpeg).decode("ascii")


def render(metrics: dict[str, Any], *, title: str, examples: Sequence[ErrorExample], out: Path) -> None:
    """Write the page.

    Args:
        metrics: what `smearline.metrics.evaluate` gave, or metrics.json read back.
        title: of the page, such as the model's name and version.
        examples: the most confident errors, shown in the order given.
        out: the HTML file; its folder must exist.
    """
    environment = Environment(
        loader=PackageLoader("smearline.evaluation_page", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": wording.count,
        "percent": wording.percent,
        "span": wording.span,
        "decimal": wording.decimal,
        "name": wording.name,
        "listed": wording.listed,
    }
    page = environment.get_template("page.html.j2").render(
        m=metrics,
        title=title,
        examples=examples,
        summary=wording.summary(metrics),
        scopes=_scopes(metrics),
        tested={n: c for n, c in metrics["characteristics"].items() if c["status"] == "tested"},
        shown_smears=_shown_smears(metrics),
        figures=figures,
        top_confusions=wording.top_confusions,
    )
    out.write_text(page, encoding="utf-8")


def _scopes(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """What is shown once for all sites together and, where there are several, once for each site."""
    parts = ("types", "parents", "confusion", "calibration", "blast")
    names = list(metrics["types"]["by_site"])
    together = {"title": "All sites" if len(names) > 1 else f"Site {names[0]}", "counts": metrics["counts"]}
    sites = [
        {"title": f"Site {site}", "counts": metrics["counts"]["by_site"][site]}
        | {p: metrics[p]["by_site"][site] for p in parts}
        for site in names
    ]
    return [together | {p: metrics[p]["overall"] for p in parts}, *(sites if len(names) > 1 else [])]


def _shown_smears(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Smears on which blasts were missed or wrongly seen, then those with most labelled blasts; at most 25."""
    rows = metrics["blast"]["smears"].get("rows", [])

    def finding(row: dict[str, Any]) -> tuple[int, str]:
        true, predicted = row["true_share"]["value"], row["predicted_share"]["value"]
        if true and not predicted:
            return 0, "all missed"
        if (true >= MANY) != (predicted >= MANY):
            return (1, "5 % reached by the label only") if true >= MANY else (2, "5 % reached by the recogniser only")
        return (3, "") if true or not predicted else (2, "seen where none is labelled")

    found = [row | {"rank": finding(row)[0], "finding": finding(row)[1]} for row in rows]
    found.sort(
        key=lambda r: (r["rank"], -r["true_share"]["value"], -r["predicted_share"]["value"], r["site"], r["smear"])
    )
    return [r for r in found if r["true_blasts"] or r["predicted_blasts"]][:MOST_SMEARS]
