"""`smearline adapt`: a recogniser for a new site, from a few labelled cells of it, that still knows its own.

The platform chooses the cells to label (new_site.py). The head for the types is fitted anew on them and on cells of home
(refit.fit_head). The new site's mix of types is estimated from its cells without labels, and probabilities are moved towards it
(confidence.mix_of). It runs in the workspace that made the recogniser, whose data are home.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines import calibrate, refit, train_cells
from pipelines.new_site import REPORT, NewSite, ask_for_labels, mix_taught
from smearline import confidence, curves, plain_json, reader, vocabulary
from smearline.errors import DataError
from smearline.recognition import CARD_FILE, SEEN_FILE, RecognitionModel, recognise

_FIGURES = ("cells", "patients", "accuracy", "balanced_accuracy")
_MOST = 4.0
"""Times; chosen on PBC's network at patients of JHU that are not in the test, where 4 to 50 changed little but the rare types."""


def adapt(
    model: Path, cells: Path, budgets: Sequence[int], out: Path, weights: Path | None = None
) -> dict[int, dict[str, Any]]:
    """Write the adapted model folder `out`, `out`.safetensors beside it, and `out`/adaptation.json, returned by its budget.

    Of several budgets each has a model, `out`/BUDGET; `out`/adaptation_curve.csv says what so many labels bring, and the evaluation
    page shows it. Cells that one budget chose are not those of a smaller one and some more: labels of all of them are asked for
    before anything is fitted.

    Args:
        budgets: cells to label; with 0 the network stays as it is, and only the site's mix of types is estimated.
        weights: of `model`; default: MODEL.safetensors beside it, as the pipeline leaves them.

    Raises:
        ModelError: the weights are missing, or `model` is an adapted one.
        DataError: cells that were chosen have no label; the message says where they are listed. Or there is nothing to choose, or
            with a budget of 0 no mix to estimate. Or `out` is something else than an adapted model, which would be lost.
    """
    out, budgets = out.absolute(), sorted(set(budgets))
    places = {budget: out / str(budget) if len(budgets) > 1 else out for budget in budgets}
    if len(budgets) > 1 and (out / CARD_FILE).is_file():
        raise DataError(f"{out} is a recogniser: several budgets have a folder each below --out; give another")
    for place in places.values():
        beside = place.with_name(f"{place.name}.safetensors")
        adapted = (place / REPORT).is_file()
        if ((place.exists() or beside.exists()) and not adapted) or any(place.glob(f"*/{REPORT}")):
            raise DataError(
                f"{place if place.exists() else beside} is there already, and is no adapted recogniser, or holds others: give "
                "another --out, or remove it"
            )
    site, listed = NewSite(model, cells, weights, budgets), out.with_name(f"{out.name}.chosen.csv")
    chosen = site.chosen(budgets, listed)
    ask_for_labels(site, chosen, listed, out)
    reports = {budget: _adapt(site, budget, part, places[budget]) for budget, part in chosen.items()}
    if len(places) > 1:
        _leave_curve(site, reports, out)
    return reports


def _leave_curve(site: NewSite, reports: dict[int, dict[str, Any]], out: Path) -> None:
    rows = list[dict[str, Any]]()
    for report in reports.values():
        for where, words in (("new_site", "the new site"), ("home_validation_cells", "home")):
            for when, figures in report[where].items():
                if figures and (when == "after" or not any(row["where"] == words for row in rows)):
                    adapted = "as it was" if when == "before" else "adapted"
                    told = {"where": words, "model": adapted, "labels": report["labelled"] * (when == "after")}
                    rows.append(told | {name: figures[name] for name in _FIGURES})
    pd.DataFrame(rows, columns=["where", "model", "labels", *_FIGURES]).to_csv(
        out / "adaptation_curve.csv", index=False
    )
    if any(row["model"] == "adapted" for row in rows):
        name = "-".join([*sorted(set(site.index["site"]) - set(site.model.card.sites)), out.name])
        left = curves.leave(curves.FOLDER, name, recipe=site.model.recipe, rows=rows)
        print(f"left for the evaluation page that the next dvc repro writes: {left}; commit it")


def _adapt(site: NewSite, budget: int, chosen: pd.DataFrame, out: Path) -> dict[str, Any]:
    watched = site.watched
    unfinished = out.with_name(f"{out.name}.unfinished")
    weights, unfinished_weights = (p.with_name(f"{p.name}.safetensors") for p in (out, unfinished))
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    if len(chosen):
        taught = _refit(site, chosen, unfinished, unfinished_weights)
    else:
        taught = site.again
        shutil.copytree(site.folder, unfinished)
        shutil.copy2(site.weights, unfinished_weights)
    mixes = _note_mixes(site, taught, unfinished)
    after = RecognitionModel(unfinished)
    limits = after.card.confidence
    there = {"before": site.predictions}
    if len(site.judged):
        there["after"] = recognise(after, site.cells, keep=set(site.judged["sha256"]))[0]
    here = {}
    if len(watched):
        keep, data = set(watched["sha256"]), site.recipe.data.folder
        here = {"before": site.before_at_home, "after": recognise(after, data, keep=keep)[0]}
    told = {
        "budget": budget,
        "labelled": len(chosen),
        "chosen": {str(k): int(v) for k, v in chosen["true_type"].value_counts().items()},
        "taught_nothing": int((taught["weight"] == 0).sum()),
        "estimated_mix": mixes,
        "limits_learned_without": sorted(set(limits.offsets if limits else ()) - set(site.model.card.sites)),
        "new_site": {name: _scores(site.judged, found) for name, found in there.items()},
        "home_validation_cells": {name: _scores(watched, found) for name, found in here.items()},
    }
    report: dict[str, Any] = plain_json.plain(told)
    plain_json.write(unfinished / REPORT, report)
    shutil.rmtree(out, ignore_errors=True)
    unfinished.rename(out)
    unfinished_weights.replace(weights)
    return report


def _refit(site: NewSite, chosen: pd.DataFrame, out: Path, weights: Path) -> pd.DataFrame:
    """The head fitted anew, calibrated on home's validation cells. Returns what it was fitted on, with each cell's `weight`.

    Raises:
        DataError: none of the labels says anything of a type, or home has no cell of one of the model's types any more.
    """
    home = site.home[site.home["split"] != "test"]
    frame = pd.concat([home, chosen.assign(split="train")], ignore_index=True)
    types, again = reader.trainable(frame[frame["split"] == "train"])[0], site.again
    if lost := set(site.model.card.types) - set(types):
        raise DataError(
            f"the workspace has no labelled training cell of {', '.join(sorted(lost))} any more: train again"
        )
    allowed = reader.targets(chosen, types, {})[0]
    teaches = allowed.any(axis=1)  # not a parent's label none of whose children was ever labelled
    if not teaches.any():
        raise DataError(
            "no label of the cells that were chosen is of a type, or of a parent of one, that is known here"
        )
    chosen = chosen.assign(weight=teaches * again["weight"].sum() / teaches.sum())
    network = site.network(types)
    print(f"fitting the head on {len(chosen)} cells of the new site and {len(again)} of home", flush=True)
    here = refit.Cells(site.home_features, reader.targets(again, types, {})[0], again["weight"].to_numpy(float))
    there = refit.Cells(site.features(chosen), allowed, chosen["weight"].to_numpy(float))
    refit.fit_head(network, here, there, site.adapting.strength)
    with tempfile.TemporaryDirectory() as folder:
        train_cells.write(network, 1.0, frame, site.recipe, Path(folder), weights)
        # The adapted model has also seen what the first one saw.
        both = pd.concat([pd.read_parquet(Path(folder) / SEEN_FILE), site.model.seen], ignore_index=True)
        both.drop_duplicates("sha256").to_parquet(Path(folder) / SEEN_FILE, index=False)
        calibrate.calibrate(Path(folder), out, home, site.recipe, new=(chosen, site.cells))
    return pd.concat([again, chosen], ignore_index=True)


def _note_mixes(site: NewSite, taught: pd.DataFrame, out: Path) -> dict[str, dict[str, float]]:
    """Put offsets into the card for sites of the new cells that are none of home, `confidence.natural_mix` of the way to the mix of
    types of the cells that may be chosen, whose labels are not looked at; returns the mixes.

    No type is moved more than `_MOST` times, and blasts are made no less probable beside any other (confidence.offsets_for). The
    card's limits were learned at home, without these offsets; the report names the sites (`limits_learned_without`).
    """
    model, home = RecognitionModel(out), set(site.model.card.sites)
    limits, types = model.card.confidence, model.card.types
    if limits is None:
        return {}
    if (drawn := mix_taught(taught, types)) is None:
        print(
            "no mix of types is estimated: too many labels are of a parent, and which of its children they are is not known"
        )
        return {}
    card = model.card
    model.card = card.model_copy(update={"confidence": None})  # what the network says, moved by nothing
    predictions = recognise(model, site.cells, keep=set(site.pool["sha256"]))[0]
    offsets, found = dict(limits.offsets), {}
    elsewhere, natural_mix = limits.temperatures.get(confidence.ELSEWHERE, 1.0), site.recipe.confidence.natural_mix
    for name, part in predictions.groupby("site"):
        if name in home or len(part) < confidence.LEAST_OF_SITE:
            continue
        warmth = limits.temperatures.get(str(name), elsewhere)  # its own, where all of its patients are for validation
        own = part[[f"p_{t}" for t in types]].to_numpy(np.float32)
        offsets[str(name)], mix = confidence.unlabelled_offsets(types, own, drawn, warmth, natural_mix, _MOST)
        found[str(name)] = {t: round(float(v), 4) for t, v in zip(types, mix, strict=True)}
    card = card.model_copy(update={"confidence": limits.model_copy(update={"offsets": offsets})})
    plain_json.write(out / CARD_FILE, card.model_dump(mode="json"))
    return found


def _scores(labelled: pd.DataFrame, found: pd.DataFrame) -> dict[str, Any] | None:
    """Share of right names, a parent's label allowing its children, in all and the mean over the labels; and the share named."""
    if labelled.empty:
        return None
    words, rows = vocabulary.load(), found.set_index("sha256").loc[labelled["sha256"]]
    pairs = zip(rows["predicted_type"], labelled["true_type"], strict=True)
    right = pd.Series([said in words.children(label) for said, label in pairs])
    told = {"cells": len(right), "patients": int(labelled["patient"].nunique()), "accuracy": float(right.mean())}
    told |= {"balanced_accuracy": float(right.groupby(labelled["true_type"].to_numpy()).mean().mean())}
    return told | ({"named": float(rows["named"].mean())} if "named" in rows else {})
