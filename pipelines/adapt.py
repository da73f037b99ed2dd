"""`smearline adapt`: a recogniser for a new site, from a few labelled cells of it, that still knows its own.

Which cells are worth labelling is for the platform to say: of each type that the recogniser sees at the new site a number in
proportion to the root of how many it sees, spread over what they look like (the cell nearest to each k-means centre of their
embeddings). They are trained on together with cells of home, from the recogniser's weights on, for a few epochs.

The new site's mix of types is estimated from its cells without labels, and probabilities are moved towards it (confidence.mix_of).

Patients of the new site that are held out are never chosen: their labelled cells judge. It runs in the workspace that made the
recogniser, whose data are home.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as plots
from numpy.typing import NDArray

from pipelines import calibrate, train_cells, training
from pipelines.cells import split_cells
from smearline import confidence, dataset, plain_json, reader, settings, splits, vocabulary
from smearline.errors import DataError, ModelError
from smearline.recognition import CARD_FILE, SEEN_FILE, RecognitionModel, recognise, scale_of

REPORT = "adaptation.json"
_RAREST = 4.0
"""Times; chosen on PBC's network at patients of JHU that are not in the test, where 4 to 50 changed little but the rare types."""


def adapt(model: Path, cells: Path, budget: int, out: Path, weights: Path | None = None) -> dict[str, Any]:
    """Write the adapted model folder `out`, `out`.safetensors beside it, and `out`/adaptation.json, which is returned.

    Args:
        budget: cells to label; with 0 the network stays as it is, and only the site's mix of types is estimated.
        weights: of `model`; default: MODEL.safetensors beside it, as the pipeline leaves them.

    Raises:
        ModelError: the weights are missing.
        DataError: cells that were chosen have no label; the message says where they are listed. Or there is nothing to choose.
    """
    weights = weights or model.with_name(f"{model.name}.safetensors")
    if not weights.is_file():
        raise ModelError(
            f"there is no {weights}: adapting goes on from a recogniser's weights; name them with --weights"
        )
    before, params = RecognitionModel(model), settings.load()
    # What its card does not say, since it is of an older version, is as the workspace has it.
    raw = settings.overlaid(params.model_dump(mode="json"), before.card.parameters)
    recipe = settings.check({k: v for k, v in raw.items() if k in settings.Settings.model_fields}, str(model))
    site = dataset.labelled_index(cells)
    site["scale"] = [scale_of(s, m)[0] for s, m in zip(site["site"], site["microns_per_px"], strict=True)]
    labelled = (site["true_type"].notna() & ~site["conflicted"].astype(bool)).to_numpy()
    seen = _seen(site, before.seen)
    judging = (splits.places(site, params.adapt.seed) < params.adapt.held_out).to_numpy()
    print(f"recognising {len(site)} cells of {', '.join(sorted(site['site'].unique()))}", flush=True)
    predictions, embeddings = recognise(before, cells)
    candidates = site["sha256"][~judging & ~seen]
    known = predictions["sha256"].isin(candidates).to_numpy()
    home = split_cells(recipe)
    home = home[home["true_type"].notna() & ~home["conflicted"].astype(bool)]
    watched = home[home["split"] == "val"]
    chosen = site.iloc[:0]
    if budget:
        picked = choose(predictions[known].reset_index(drop=True), embeddings[known], budget, params.adapt.seed)
        chosen = site[site["sha256"].isin(picked)]
        _labelled(chosen, predictions, out)
        _train_on(before, recipe, params.adapt, weights, home, chosen, cells, out)
    else:
        shutil.copytree(model, out, dirs_exist_ok=True)
        shutil.copy2(weights, out.with_name(f"{out.name}.safetensors"))
    mixes = _note_mixes(out, cells, set(candidates), recipe)

    after = RecognitionModel(out)
    judged = site[judging & labelled & ~seen]
    there = {"before": predictions, "after": recognise(after, cells)[0]}
    here = {}
    if len(watched):
        keep = set(watched["sha256"])
        here = {n: recognise(m, recipe.data.folder, keep=keep)[0] for n, m in (("before", before), ("after", after))}
    report = {
        "budget": budget,
        "labelled": len(chosen),
        "chosen": {str(k): int(v) for k, v in chosen["true_type"].value_counts().items()},
        "estimated_mix": mixes,
        "new_site": {name: _scores(judged, found) for name, found in there.items()},
        "home_validation_cells": {name: _scores(watched, found) for name, found in here.items()},
    }
    plain_json.write(out / REPORT, plain_json.plain(report))
    return report


def _train_on(
    before: RecognitionModel,
    recipe: settings.Settings,
    adapting: settings.AdaptSettings,
    weights: Path,
    home: pd.DataFrame,
    chosen: pd.DataFrame,
    cells: Path,
    out: Path,
) -> None:
    """From the weights on, with cells of home; calibrated on home's validation cells."""
    taught, watched = (home[home["split"] == part] for part in ("train", "val"))
    again = _again(taught, adapting.home_cells, adapting.seed)
    frame = pd.concat([again, watched, chosen.assign(split="train")], ignore_index=True)
    longer = {"epochs": adapting.epochs, "lr": adapting.lr, "small_epochs": 0, "seed": adapting.seed}
    over = {"model": {"weights": str(weights.resolve())}, "train": longer}
    recipe = settings.check(settings.overlaid(recipe.model_dump(mode="json"), over), "adapt")
    print(f"training on {len(chosen)} cells of the new site and {len(again)} of home", flush=True)
    trained = training.fit(frame, recipe)
    unfinished = out.with_name(f"{out.name}.unfinished")
    train_cells.write(trained, frame, recipe, unfinished, out.with_name(f"{out.name}.safetensors"))
    # The adapted model has also seen what the first one saw.
    both = pd.concat([pd.read_parquet(unfinished / SEEN_FILE), before.seen], ignore_index=True)
    both.drop_duplicates("sha256").to_parquet(unfinished / SEEN_FILE, index=False)
    home_now = pd.concat([again, watched], ignore_index=True)
    calibrate.calibrate(unfinished, out, home_now, recipe, new=(chosen, cells), mix=taught)
    shutil.rmtree(unfinished)


def _note_mixes(out: Path, cells: Path, keep: set[str], recipe: settings.Settings) -> dict[str, dict[str, float]]:
    """Put offsets into the card for sites that have none, `confidence.natural_mix` of the way to the mix of types of these cells,
    whose labels are not looked at; returns the mixes.

    No type is taken for more than `_RAREST` times rarer than training drew it, and blasts for no rarer at all: a rare cell that
    is missed costs more than the figure gains.
    """
    model = RecognitionModel(out)
    if model.card.confidence is None or not keep:
        return {}
    predictions = recognise(model, cells, keep=keep)[0]
    counts = model.seen.groupby(["site", "true_type"]).size() ** (1 - recipe.train.balance)
    drawn = counts.groupby("true_type").sum().reindex(list(model.card.types)).fillna(1.0).to_numpy(float)
    drawn /= drawn.sum()
    offsets, found = dict(model.card.confidence.offsets), {}
    for site, part in predictions.groupby("site"):
        if site in offsets or len(part) < confidence.LEAST_OF_SITE:
            continue
        mix = confidence.mix_of(part[[f"p_{t}" for t in model.card.types]].to_numpy(np.float32), drawn)
        least = np.where(np.array(model.card.types) == "BLAST", 1.0, 1 / _RAREST)
        moved = recipe.confidence.natural_mix * np.log(np.maximum(mix / drawn, least))
        offsets[str(site)] = tuple(round(float(v), 6) for v in moved)
        found[str(site)] = {t: round(float(v), 4) for t, v in zip(model.card.types, mix, strict=True)}
    limits = model.card.confidence.model_copy(update={"offsets": offsets})
    card = model.card.model_copy(update={"confidence": limits})
    plain_json.write(out / CARD_FILE, card.model_dump(mode="json"))
    return found


def curve(model: Path, cells: Path, budgets: Sequence[int], out: Path, weights: Path | None = None) -> pd.DataFrame:
    """`adapt` for each budget into `out`/BUDGET, and `out`/adaptation_curve.{csv,html}: what so many labels bring.

    Cells that one budget chose are not those of a smaller one and some more. Raises as `adapt` does, before anything is trained
    where the labels of the largest budget are missing.
    """
    rows = list[dict[str, Any]]()
    for budget in sorted(budgets, reverse=True):
        report = adapt(model, cells, budget, out / str(budget), weights)
        for where, words in (("new_site", "the new site"), ("home_validation_cells", "home")):
            for when, figures in report[where].items():
                labels = 0 if when == "before" else report["labelled"]
                rows.append({"where": words, "labels": labels, **(figures or {})})
    table = pd.DataFrame(rows).drop_duplicates(["where", "labels"]).sort_values(["where", "labels"])
    table.to_csv(out / "adaptation_curve.csv", index=False)
    figure = plots.Figure()
    for (where, part), dash in zip(table.groupby("where"), ("dot", "solid"), strict=False):
        for name in ("accuracy", "balanced_accuracy"):
            line = {"dash": dash}
            figure.add_scatter(x=part["labels"], y=part[name], mode="lines+markers", line=line, name=f"{where}: {name}")
    figure.update_layout(
        title="Research use only. Adaptation: share of right names among cells of held-out patients, by labels of the new site",
        xaxis_title="labelled cells of the new site",
        yaxis_tickformat=".0%",
        template="plotly_white",
    )
    figure.write_html(out / "adaptation_curve.html", include_plotlyjs=True)
    return table


def choose(predictions: pd.DataFrame, embeddings: NDArray[np.float16], budget: int, seed: int) -> list[str]:
    """SHA-256 of the cells to label; the same for the same input. Raises DataError where there is none."""
    from sklearn.cluster import KMeans

    if not len(predictions):
        raise DataError("there is no cell to choose: all were trained on, or belong to patients that are held out")
    counts = predictions["predicted_type"].value_counts().sort_index()
    wanted = _quotas(counts, min(budget, len(predictions)))
    found: list[str] = []
    for kind, number in wanted.items():
        rows = np.flatnonzero(predictions["predicted_type"] == kind)
        vectors = embeddings[rows].astype(np.float32)
        centres = KMeans(number, n_init=1, random_state=seed).fit(vectors).cluster_centers_
        free = np.ones(len(rows), bool)
        for centre in centres:  # two centres never share a cell
            away = np.where(free, ((vectors - centre) ** 2).sum(axis=1), np.inf)
            free[int(away.argmin())] = False
        found += list(predictions["sha256"].iloc[rows[~free]])
    return found


def _quotas(counts: pd.Series, total: int) -> dict[str, int]:
    """As many of each type as the root of its number asks for, and never more than there are; they sum to `total`."""
    quota = dict.fromkeys(counts.index, 0)
    for _ in range(total):
        neediest = min(
            (k for k in quota if quota[k] < counts[k]), key=lambda k: ((quota[k] + 1) / np.sqrt(counts[k]), str(k))
        )
        quota[neediest] += 1
    return {str(kind): number for kind, number in quota.items() if number}


def _seen(site: pd.DataFrame, seen: pd.DataFrame) -> NDArray[np.bool_]:
    """Whether the first model was trained on a cell, or on another of its patient."""
    patients = pd.MultiIndex.from_frame(seen.loc[seen["patient"].notna(), ["site", "patient"]])
    of_patient = site["patient"].notna().to_numpy() & site.set_index(["site", "patient"]).index.isin(patients)
    return np.asarray(site["sha256"].isin(seen["sha256"]).to_numpy() | of_patient)


def _labelled(chosen: pd.DataFrame, predictions: pd.DataFrame, out: Path) -> None:
    """Raises DataError where a chosen cell has no undisputed label, after listing them in a table a site."""
    missing = chosen[chosen["true_type"].isna() | chosen["conflicted"].astype(bool)]
    if missing.empty:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    said = predictions.set_index("sha256")["predicted_type"]
    about = missing[["sha256", "site", "patient", "smear"]].assign(suggested=said[missing["sha256"]].to_numpy())
    about.to_csv(out.with_name(f"{out.name}.suggested.csv"), index=False)
    steps = []
    for name, part in missing.groupby("site"):
        table = out.with_name(f"{out.name}.to-label-{name}.csv")
        part[["sha256"]].assign(type="").to_csv(table, index=False)
        steps.append(f"smearline label {table} --site {name} --by ROLE --supersede --data CELLS")
    raise DataError(
        f"{len(missing)} of the {len(chosen)} cells that were chosen have no undisputed label. Fill in the column type, then "
        f"{'; '.join(steps)}, and run this again. {out.name}.suggested.csv says what they are taken for"
    )


def _again(train: pd.DataFrame, number: int, seed: int) -> pd.DataFrame:
    """Cells of home: some of every type, and the others of each type and site in proportion to the root of its number."""
    first = train.sample(frac=1, random_state=seed).groupby(["site", "true_type"]).head(confidence.LEAST_OF_TYPE)
    rest = train.drop(first.index)
    weights = reader.drawing_weights(rest, 0.5) if len(rest) else None
    more = min(max(0, number - len(first)), len(rest))
    picked = np.random.default_rng(seed).choice(rest.index, more, replace=False, p=weights)
    return train.loc[sorted({*first.index, *picked})]


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
