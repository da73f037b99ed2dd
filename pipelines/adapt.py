"""`smearline adapt`: a recogniser for a new site, from a few labelled cells of it, that still knows its own.

Which cells are worth labelling is for the platform to say: of each type that the recogniser sees at the new site a number in
proportion to the root of how many it sees, spread over what they look like (the cell nearest to each k-means centre of their
embeddings). They are trained on together with cells of home, from the recogniser's weights on, for a few epochs.

Patients of the new site that are held out are never chosen: their labelled cells judge. It runs in the workspace that made the
recogniser, whose data are home.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipelines import calibrate, train_cells, training
from pipelines.cells import split_cells
from smearline import dataset, plain_json, reader, settings, splits, vocabulary
from smearline.errors import DataError, ModelError
from smearline.recognition import SEEN_FILE, RecognitionModel, recognise, scale_of

REPORT = "adaptation.json"


def adapt(model: Path, cells: Path, budget: int, out: Path, weights: Path | None = None) -> dict[str, Any]:
    """Write the adapted model folder `out`, `out`.safetensors beside it, and `out`/adaptation.json, which is returned.

    Args:
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
    recipe = settings.check(before.card.parameters, f"the parameters of {model}")
    site = dataset.labelled_index(cells)
    site["scale"] = [scale_of(s, m)[0] for s, m in zip(site["site"], site["microns_per_px"], strict=True)]
    judging = _held_out(site, params.adapt.held_out, params.adapt.seed)
    print(f"recognising {len(site)} cells of {', '.join(sorted(site['site'].unique()))}", flush=True)
    predictions, embeddings = recognise(before, cells)
    said = predictions.set_index("sha256")["predicted_type"].reindex(site["sha256"])
    candidates = site["sha256"][~judging & ~site["sha256"].isin(before.seen["sha256"]).to_numpy()]
    known = predictions["sha256"].isin(candidates).to_numpy()
    picked = choose(predictions[known].reset_index(drop=True), embeddings[known], budget, params.adapt.seed)
    chosen = site[site["sha256"].isin(picked)]
    _labelled(chosen, said, out)

    home = split_cells(recipe)
    home = home[home["true_type"].notna() & ~home["conflicted"].astype(bool)]
    again = _again(home[home["split"] == "train"], params.adapt.home_cells, params.adapt.seed)
    watched = home[home["split"] == "val"]
    frame = pd.concat([again, watched, chosen.assign(split="train")], ignore_index=True)
    tried = settings.overlaid(
        recipe.model_dump(mode="json"),
        {
            "model": {"weights": str(weights.resolve())},
            "train": {
                "epochs": params.adapt.epochs,
                "lr": params.adapt.lr,
                "small_epochs": 0,
                "seed": params.adapt.seed,
            },
        },
    )
    recipe = settings.check(tried, "adapt")
    print(f"training on {len(chosen)} cells of the new site and {len(again)} of home", flush=True)
    trained = training.fit(frame, recipe)
    unfinished = out.with_name(f"{out.name}.unfinished")
    train_cells.write(trained, frame, recipe, unfinished, out.with_name(f"{out.name}.safetensors"))
    calibrate.calibrate(unfinished, out, pd.concat([again, watched], ignore_index=True), recipe)
    _everything_seen(before, out)
    shutil.rmtree(unfinished)

    after = RecognitionModel(out)
    answers = {"before": said, "after": _answers(after, cells, set(site["sha256"]))}
    at_home = {
        name: _answers(m, recipe.data.folder, set(watched["sha256"]))
        for name, m in (("before", before), ("after", after))
    }
    judged = site[judging & site["true_type"].notna() & ~site["conflicted"].astype(bool)]
    report = {
        "budget": budget,
        "labelled": len(chosen),
        "chosen": {str(k): int(v) for k, v in chosen["true_type"].value_counts().items()},
        "new_site": {name: _accuracy(judged, found) for name, found in answers.items()},
        "home_validation_cells": {name: _accuracy(watched, found) for name, found in at_home.items()},
    }
    plain_json.write(out / REPORT, plain_json.plain(report))
    return report


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


def _held_out(site: pd.DataFrame, share: float, seed: int) -> NDArray[np.bool_]:
    """Whether each cell belongs to a patient (else smear, else is a cell) that judges."""
    assigned = splits.places(site, seed)
    return np.asarray(assigned < share)


def _labelled(chosen: pd.DataFrame, said: pd.Series, out: Path) -> None:
    """Raises DataError where a chosen cell has no undisputed label, after listing them."""
    missing = chosen[chosen["true_type"].isna() | chosen["conflicted"].astype(bool)]
    if missing.empty:
        return
    table = out.with_name(f"{out.name}.to-label.csv")
    table.parent.mkdir(parents=True, exist_ok=True)
    listed = missing[["sha256", "site", "patient", "smear"]].assign(
        type="", suggested=said[missing["sha256"]].to_numpy()
    )
    listed.to_csv(table, index=False)
    raise DataError(
        f"{len(missing)} of the {len(chosen)} cells that were chosen have no undisputed label; they stand in {table}: fill in the "
        f"column type, then smearline label {table} --site SITE --by ROLE --data CELLS, and run this again"
    )


def _again(train: pd.DataFrame, number: int, seed: int) -> pd.DataFrame:
    """Cells of home, each type and site in proportion to the root of its number."""
    weights = reader.drawing_weights(train, 0.5)
    picked = np.random.default_rng(seed).choice(len(train), min(number, len(train)), replace=False, p=weights)
    return train.iloc[np.sort(picked)]


def _everything_seen(before: RecognitionModel, out: Path) -> None:
    """The adapted model has also seen what the first one saw."""
    path = out / SEEN_FILE
    seen = pd.concat([pd.read_parquet(path), before.seen], ignore_index=True)
    seen.drop_duplicates("sha256").to_parquet(path, index=False)


def _answers(model: RecognitionModel, cells: Path, keep: set[str]) -> pd.Series:
    return recognise(model, cells, keep=keep)[0].set_index("sha256")["predicted_type"]


def _accuracy(labelled: pd.DataFrame, said: pd.Series) -> dict[str, Any] | None:
    """Share of right names, a parent's label allowing its children; and the mean over the labels."""
    if labelled.empty:
        return None
    words = vocabulary.load()
    found = said.reindex(labelled["sha256"]).to_numpy()
    right = pd.Series([s in words.children(t) for s, t in zip(found, labelled["true_type"], strict=True)])
    by_type = right.groupby(labelled["true_type"].to_numpy()).mean()
    return {
        "cells": len(right),
        "patients": int(labelled["patient"].nunique()),
        "accuracy": float(right.mean()),
        "balanced_accuracy": float(by_type.mean()),
    }
