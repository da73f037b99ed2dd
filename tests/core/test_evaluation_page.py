"""The evaluation page: complete, self-contained, and harmless whatever stands in the data."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from smearline import curves
from smearline.errors import DataError
from smearline.evaluation_page import render
from smearline.metrics import evaluate
from smearline.vocabulary import load

NASTY = "<script>alert('x')</script>"
EXAMPLE = {
    "data_uri": "data:image/jpeg;base64,/9j/IHBpY3R1cmU=",
    "site": NASTY,
    "true_type": "BLAST",
    "predicted_type": "LYMPH",
    "probability": 0.9996,
    "sha256_prefix": "0123abcd",
}


def simulated(num_cells: int = 3000, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predictions of a middling recogniser and characteristic labels; site gamma knows neither patients nor bands."""
    vocabulary, rng = load(), np.random.default_rng(seed)
    types = np.array(list(vocabulary.types), dtype=object)
    true = rng.choice(len(types), num_cells, p=np.r_[0.3, 0.08, np.full(5, 0.05), 0.2, np.full(9, 0.018), 0.008])
    near = np.array([[b in vocabulary.types[a].neighbours for b in types] for a in types])
    logits = 1.3 * rng.normal(size=(num_cells, len(types))) + 2.5 * near[true]
    logits[np.arange(num_cells), true] += 6
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    site = np.array(["alpha", "beta", "gamma"], dtype=object)[rng.integers(0, 3, num_cells)]
    patient = np.array([f"p{i}" for i in rng.integers(0, 40, num_cells)], dtype=object)
    patient[site == "gamma"] = None
    label = types[true].copy()
    label[::50] = None
    label[(site == "gamma") & np.isin(label, ["NEUT_SEG", "NEUT_BAND"])] = "NEUT"
    frame = pd.DataFrame(
        {
            "sha256": [f"{i:064x}" for i in range(num_cells)],
            "site": site,
            "patient": patient,
            "smear": [None if p is None else f"s{p}" for p in patient],
            "true_type": label,
            "predicted_type": types[chances.argmax(axis=1)],
            "scale_assumed": site == "gamma",
            "c_cell_size": rng.choice(["small", "big"], num_cells),
            "c_granularity": np.where(true % 2, "yes", "no"),
        }
    )
    truth = [
        pd.DataFrame({"sha256": frame["sha256"], "name": name, "value": frame[f"c_{name}"]})
        for name in ("cell_size", "granularity")
    ]
    return pd.concat([frame, pd.DataFrame(chances, columns=[f"p_{t}" for t in types])], axis=1), pd.concat(truth)


def taught(predictions: pd.DataFrame) -> pd.DataFrame:
    return predictions.rename(columns={f"c_{name}": name for name in ("cell_size", "granularity")})


def measured(folder: Path) -> Path:
    """A folder with a learning curve, and two adaptations: one as it should be, one whose new site has no cell that judges."""
    points = [
        {
            "share": s,
            "seed": n,
            "cells": round(800 * s),
            "patients": 9,
            "val_accuracy": a,
            "val_balanced_accuracy": a / 2,
        }
        for s, n, a in ((0.5, 0, 0.6), (0.5, 1, 0.7), (1, 0, 0.8), (1, 1, 0.9))
    ]
    law = {"exponent": 0.5, "factor": 1.0, "largest_miss": 0.0, "error_at_times_the_cells": {"2": 0.1, "4": 0.05}}
    told = {"validation_cells": 77, "epochs": 4, "expected": {"val_accuracy": law, "val_balanced_accuracy": None}}
    curves.leave(folder, curves.LEARNING, recipe="d", points=points, **told)
    home = [("home", "as it was", 0, 0.9), ("home", "adapted", 0, 0.9), ("home", "adapted", 100, 0.895)]
    there = [
        ("the new site", "as it was", 0, 0.4),
        ("the new site", "adapted", 0, 0.5),
        ("the new site", "adapted", 100, 0.75),
    ]
    for name, rows in (("north", there + home), ("south", home)):
        made = [dict(zip(("where", "model", "labels", "accuracy"), row, strict=True)) for row in rows]
        made = [row | {"cells": 9, "patients": 2, "balanced_accuracy": 0.3} for row in made]
        curves.leave(folder, name, recipe="another", rows=made)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    predictions, truth = simulated()
    metrics = evaluate(
        predictions,
        truth,
        train_labels=taught(predictions),
        origin="simulated",
        context={"model": {"name": NASTY}, "recipe": "d", "split": "by patient"},
        blast_from=0.25,
        flag_above=0.03,
    )
    folder = tmp_path_factory.mktemp("page")
    out = folder / "evaluation.html"
    metrics["curves"] = curves.read(measured(folder))
    read_back = json.loads(json.dumps(metrics, allow_nan=False))
    render(read_back, title=f"Recogniser {NASTY}", examples=[EXAMPLE], out=out)
    return out.read_text(encoding="utf-8")


def test_every_type_section_and_site_is_there(page: str) -> None:
    for code, cell_type in load().types.items():
        assert f"<code>{code}</code>" in page
        assert cell_type.name in page
    for words in (
        "Site alpha",
        "Site gamma",
        "Research use only",
        "blast probability is at least 0.250",
        "Simulated data",
        "nothing about clinical performance",
    ):
        assert words in page
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(re.findall(r'id="([^"]+)"', page))


def test_hundreds_of_cells_without_a_smear_are_shown_though_no_smear_is_known(tmp_path: Path) -> None:
    predictions, truth = simulated()
    for frame in (predictions, predictions.assign(smear=None)):
        more = {"context": {"model": {}, "split": ""}, "flag_above": 0.03}
        metrics = evaluate(frame, truth, train_labels=taught(frame), origin="simulated", **more)
        metrics["curves"] = curves.read(tmp_path)
        render(json.loads(json.dumps(metrics)), title="t", examples=[], out=tmp_path / "e.html")
        assert "cut into hundreds: how many of these are flagged" in (tmp_path / "e.html").read_text(encoding="utf-8")
    assert "No smear is known for any cell" in (tmp_path / "e.html").read_text(encoding="utf-8")


@pytest.mark.mission(
    "the evaluation page shows the curves that were measured in its workspace, and says where none was"
)
def test_what_more_data_would_bring(page: str) -> None:
    said = page.replace("\N{NO-BREAK SPACE}", " ")
    assert "Learning curve: 400: 65.0 %, 800: 85.0 %; 400: 32.5 %, 800: 42.5 %" in said
    assert "Adaptation, north: 0: 50.0 %, 100: 75.0 %; 0: 90.0 %, 100: 89.5 %" in said
    assert "the error does not fall with the cells" in said and "5.0 % with 4 times the cells" in said
    assert (
        "Filled: cells of the new site, of patients whose cells" in said
        and "No labelled cell of the new site judges; open: home" in said
    )
    assert said.count("Measured by another recipe") == 2, "the learning curve is of this model's"


def test_a_curve_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert curves.read(tmp_path) == {"learning": None, "adaptation": {}}
    for name in ("learning_curve.json", "adaptation-north.json"):
        whole = {"recipe": "d", "validation_cells": 7, "epochs": 4, "expected": {}}
        rows = [[], [{"labels": 0}], ["no row"], 7]
        wrong = [whole | {"points": r} if name.startswith("learning") else {"recipe": "d", "rows": r} for r in rows]
        for text in ('{"points": [', "[]", '{"recipe": null}', *map(json.dumps, wrong)):
            (tmp_path / name).write_text(text, encoding="utf-8")
            with pytest.raises(DataError, match=rf"{name} is no curve of this version: measure it again, or remove it"):
                curves.read(tmp_path)
        (tmp_path / name).unlink()
    assert list(curves.read(measured(tmp_path))["adaptation"]) == ["north", "south"]


def test_nothing_is_loaded_from_outside(page: str) -> None:
    assert not re.search(r"https?://|//cdn|@import|url\(|<link|<script", page)
    assert {s.split(":")[0] for s in re.findall(r'src="([^"]*)"', page)} == {"data"}


def test_texts_from_the_data_are_escaped(page: str) -> None:
    assert NASTY not in page
    assert page.count("&lt;script&gt;") >= 3  # title, context and the picture's site


class _Outline(HTMLParser):
    """Open tags, and what an accessible page needs of them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        needed = {"img": "alt", "svg": "aria-label", "th": "scope"}.get(tag)
        if needed and not given.get(needed):
            self.faults.append(f"{tag} without {needed}")
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes another element")


def test_the_markup_is_balanced_and_accessible(page: str) -> None:
    outline = _Outline()
    outline.feed(re.sub(r"<(path|rect|circle|polyline)\b[^>]*/>", "", page))
    assert (outline.faults, outline.open) == ([], [])


def test_what_is_not_quite_all_is_not_rounded_to_all(page: str) -> None:
    assert ">99.9" in page.replace("&gt;", ">")


def test_a_single_real_site_without_smears_blasts_or_characteristics(tmp_path: Path) -> None:
    predictions, truth = simulated(400)
    few = predictions[(predictions["site"] == "gamma") & predictions["true_type"].isin(["LYMPH", "MONO"])]
    out = tmp_path / "evaluation.html"
    few = few.drop(columns=["c_cell_size", "c_granularity"])
    metrics = evaluate(few, truth, train_labels=few, origin="real", context={})
    render(metrics, title="Recogniser", examples=[], out=out)
    page = out.read_text(encoding="utf-8")
    for words in ("Not patient-independent", "nothing is known about finding blasts", "No characteristic was tested"):
        assert words in page
    assert "Simulated data" not in page
    assert "What more data would bring" not in page, "nobody asked"
    render(metrics | {"curves": curves.read(tmp_path)}, title="Recogniser", examples=[], out=out)
    page = out.read_text(encoding="utf-8")
    assert "No learning curve was measured" in page and "No adaptation was measured" in page
