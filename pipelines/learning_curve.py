"""`smearline learning-curve`: how good the recogniser gets with a part of its data, and so what more data would bring.

Patients (smears or cells, where no patient is known) are left out, not single cells, and the parts lie one within the other. Each
part is trained on for the same number of steps, to half an epoch of its own, and judged on the same validation cells, of types
that every part teaches; the test cells stay untouched. The
line through the errors is error = a * n ** -b (Hestness 2017, arXiv 1712.00409), drawn on to four times the data where the errors
fall; it says what to expect if more patients are like those at hand, and nothing else.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as plots

from pipelines import training
from pipelines.cells import in_force, split_cells
from smearline import curves, dataset, reader, settings, splits, vocabulary
from smearline.errors import DataError
from smearline.recognition import recipe_of

FURTHER = (2, 4)
ERRORS = {"val_accuracy": "all cells", "val_balanced_accuracy": "mean over the types"}
Json = dict[str, Any]


def learning_curve(out: Path, shares: list[float], epochs: int, seeds: int) -> Json:
    """Write `out`/learning_curve.{json,csv,html}, and the JSON for the evaluation page too; returns what it holds.

    Args:
        shares: of the training patients, each in 0..1.
        epochs: of the whole data; a part is trained on for as many steps.

    Raises:
        DataError: fewer than two shares, or there are no validation cells.
    """
    if len(set(shares)) < 2 or not all(0 < share <= 1 for share in shares):
        raise DataError("a curve needs two shares at least, each above 0 and at most 1: --share 0.25 --share 1")
    params = in_force()
    frame = split_cells(params)
    train = frame[(frame["split"] == "train") & frame["true_type"].notna() & ~frame["conflicted"].astype(bool)]
    watched = frame[frame["split"] == "val"]
    places = [splits.places(dataset.whose(train), params.train.seed + 1000 * (seed + 1)) for seed in range(seeds)]
    # Judged on what every part was taught: the parts lie one within the other, so the smallest knows the fewest types.
    taught = set.intersection(*(set(reader.trainable(train[place < min(shares)])[0]) for place in places))
    words = vocabulary.load()
    watched = watched[[isinstance(t, str) and set(words.children(t)) <= taught for t in watched["true_type"]]]
    if watched.empty:
        raise DataError(
            "a curve is judged on validation cells, and none is labelled with a type of which the smallest share holds one: give "
            "split.val more than 0, or a larger share"
        )
    rows = []
    for seed, place in enumerate(places):
        for share in sorted(shares):
            part = train[place < share] if share < 1 else train
            longer = as_long(epochs, len(train), len(part), params.train.batch_size)  # the types are those of the part
            over = {"train": {"epochs": longer, "seed": params.train.seed + seed}}
            tried = settings.check(settings.overlaid(params.model_dump(mode="json"), over), "learning-curve")
            print(f"share {share:g}, seed {seed}: {len(part)} cells, {part['patient'].nunique()} patients", flush=True)
            last = training.fit(pd.concat([part, watched], ignore_index=True), tried, label="  ").history[-1]
            counted = {"share": share, "seed": seed, "cells": len(part), "patients": int(part["patient"].nunique())}
            rows.append(counted | {name: last[name] for name in ERRORS})
    table = pd.DataFrame(rows)
    out.mkdir(parents=True, exist_ok=True)
    table.to_csv(out / "learning_curve.csv", index=False)
    told: Json = {"validation_cells": len(watched), "epochs": epochs, "points": rows}
    told["expected"] = {name: expected(table, name) for name in ERRORS}
    told["recipe"] = recipe_of(params.model_dump(mode="json"), frame[frame["split"] != "test"])
    for folder in (out, curves.FOLDER):
        left = curves.leave(folder, curves.LEARNING, **told)
    print(f"left for the evaluation page that the next dvc repro writes: {left}; commit it")
    (out / "learning_curve.html").write_text(page(table, told), encoding="utf-8")
    return told


def as_long(epochs: int, whole: int, part: int, batch: int) -> int:
    """The epochs of `part` cells that take as many steps as `epochs` of the whole: the nearest there are."""
    steps = [max(1, cells // batch) for cells in (whole, part)]  # as training_loop counts them
    return max(1, round(epochs * steps[0] / steps[1]))


def expected(table: pd.DataFrame, name: str) -> Json | None:
    """The power law through the mean errors of each share, and the error at more data.

    None where errors do not fall with data, or one is 0.
    """
    mean = table.assign(error=1 - table[name]).groupby("share")[["cells", "error"]].mean()
    if (mean["error"] <= 0).any() or mean["cells"].nunique() < 2:
        return None
    slope, start = np.polyfit(np.log(mean["cells"]), np.log(mean["error"]), 1)
    if slope >= 0:
        return None
    whole = float(mean["cells"].iloc[-1])
    at = {str(times): float(math.exp(start + slope * math.log(whole * times))) for times in FURTHER}
    off = np.log(mean["error"]) - (start + slope * np.log(mean["cells"]))
    return {
        "exponent": float(-slope),
        "factor": float(math.exp(start)),
        "error_at_times_the_cells": at,
        "largest_miss": float(off.abs().max()),
    }


def page(table: pd.DataFrame, told: Json) -> str:
    """One page that loads nothing from outside."""
    parts, script = [], True
    for unit in ("cells", "patients"):
        figure = plots.Figure()
        for name, words in ERRORS.items():
            grouped = table.assign(error=1 - table[name]).groupby("share")
            count, error = grouped[unit].mean(), grouped["error"]
            low, high = error.mean() - error.min(), error.max() - error.mean()
            spread = {"array": high, "arrayminus": low, "visible": table["seed"].nunique() > 1}
            figure.add_scatter(x=count, y=error.mean(), error_y=spread, mode="lines+markers", name=words)
            if unit == "cells" and (line := told["expected"][name]):
                x = np.geomspace(count.min(), count.max() * FURTHER[-1], 30)
                y = line["factor"] * x ** -line["exponent"]
                figure.add_scatter(x=x, y=y, mode="lines", line={"dash": "dot"}, name=f"{words}: expected")
        figure.update_layout(
            xaxis_title=f"{unit} trained on", yaxis_title="share wrong (validation cells)", template="plotly_white"
        )
        figure.update_xaxes(type="log")
        figure.update_yaxes(type="log", tickformat=".0%")
        parts.append(figure.to_html(full_html=False, include_plotlyjs=script))
        script = False
    said = "".join(f"<li>{sentence(told, name, words)}</li>" for name, words in ERRORS.items())
    return (
        '<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>Learning curve</title>'
        '<body style="font-family:Arial,sans-serif;max-width:1000px;margin:20px auto">'
        "<p><b>Research use only.</b> Validation cells, which also chose the training's settings; no test cell was looked at.</p>"
        f"<h1>Learning curve</h1><ul>{said}</ul>{''.join(parts)}</body></html>"
    )


def sentence(told: Json, name: str, words: str) -> str:
    """What a laboratory may expect of more cells."""
    line = told["expected"][name]
    largest = max(row["share"] for row in told["points"])
    wrong = 1 - fmean(row[name] for row in told["points"] if row["share"] == largest)
    said = f"{words}: wrong {wrong:.1%} with " + ("all" if largest == 1 else f"{largest:.1%} of the patients")
    if line is None:
        return f"{said}; the error did not fall with the cells, or is 0, so nothing is expected of more"
    at = ", ".join(
        f"{error:.1%} with {times} times these cells" for times, error in line["error_at_times_the_cells"].items()
    )
    return f"{said}; if further patients are like these, about {at}"
