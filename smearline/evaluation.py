"""Judging a packaged recogniser on imported cells: predictions, metrics and a page."""

import base64
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from smearline import dataset, evaluation_page, images, lookup, metrics, occlusion, plain_json, vocabulary
from smearline.curves import read as read_curves
from smearline.metrics.readers import score_readers
from smearline.recognition import RecognitionModel, recognise, scale_of

SUSPECTS = "suspects.csv"
_SUSPECT = 0.95


def evaluate(
    model: RecognitionModel,
    directory: Path,
    out: Path,
    *,
    keep: set[str] | None = None,
    seed: int = 7,
    num_errors_shown: int = 48,
    curves: Path | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, Any]:
    """Recognise cells and judge the answers; writes predictions.parquet, metrics.json, headline.json,
    evaluation.html, and suspects.csv: cells whose label the model contradicts with 0.95 and more, for an expert to look at.

    Cells that the model was trained on, and other cells of patients that it was trained on, are predicted and counted
    but never judged. Conflicted and unlabelled cells are predicted and counted.

    Args:
        keep: judge only these sha256; None for all.
        curves: a folder of curves that were measured beside the pipeline, for the page (smearline/curves.py).

    Returns:
        The metrics; where no cell may be judged, `not_judged` says why, and there is no page.

    Raises:
        DataError: there is no cell, or a curve cannot be read.
    """
    measured = read_curves(curves) if curves else None
    predictions, _ = recognise(model, directory, keep=keep, progress=progress)
    labelled = dataset.labelled_index(directory).set_index("sha256").loc[predictions["sha256"]].reset_index()
    predictions.insert(4, "true_type", labelled["true_type"].astype("string"))
    seen = model.seen
    predictions["seen_in_training"] = dataset.trained_on(predictions, seen)
    out.mkdir(parents=True, exist_ok=True)
    predictions.to_parquet(out / "predictions.parquet", index=False)

    judged = predictions[~predictions["seen_in_training"]].reset_index(drop=True)
    limits = model.card.confidence
    context = {
        "num_cells_seen_in_training": int(predictions["seen_in_training"].sum()),
        "num_cells_conflicted": int(labelled["conflicted"].sum()),
        "data_digest": dataset.digest(judged),
        "recipe": model.recipe,
        "coverage": limits and limits.coverage,
        "limits_in_common": {s: limits.in_common(model.card.types, s) for s in limits.limits} if limits else {},
        "blast_free": list(limits.blast_free) if limits else [0, 0],
        "model": {k: v for k, v in model.card.model_dump(mode="json").items() if k not in ("parameters", "confidence")},
    }
    for old in ("metrics.json", "headline.json", "evaluation.html", SUSPECTS):
        (out / old).unlink(missing_ok=True)
    origin = "simulated" if "simulated" in {*labelled["origin"], model.card.origin} else "real"
    if judged["true_type"].isna().all():
        why = (
            f"none of the {len(predictions)} cells can be judged: {context['num_cells_seen_in_training']} are of the training data "
            "or its patients, the others have no undisputed label"
        )
        counts = {"cells": len(predictions), "labelled": 0}
        figures: dict[str, Any] = {"origin": origin, "not_judged": why, "counts": counts}
        plain_json.write(out / "metrics.json", {**figures, "context": context})
        return figures
    names = [n for n in vocabulary.load().characteristics if n in labelled]
    truth = labelled[["sha256", *names]].melt("sha256", var_name="name", value_name="value").dropna(subset=["value"])
    figures = metrics.evaluate(
        judged,
        truth[truth["sha256"].isin(judged["sha256"])].reset_index(drop=True),
        train_labels=seen,
        seed=seed,
        origin=origin,
        context=context,
        flag_above=limits.blasts_above if limits else None,
        blast_from=limits.blast_from if limits else None,
    )
    figures["readers"] = plain_json.plain(score_readers(predictions, dataset.read_labels(directory), seed))
    figures["curves"] = measured
    plain_json.write(out / "metrics.json", figures)
    plain_json.write(out / "headline.json", metrics.headline(figures))
    wrong = _wrong(judged, model.card.types)
    wrong[wrong["probability"] >= _SUSPECT][
        ["sha256", "site", "smear", "true_type", "predicted_type", "probability"]
    ].to_csv(out / SUSPECTS, index=False)
    errors = _examples(model, directory, wrong, num_errors_shown)
    evaluation_page.render(figures, title="Recogniser: evaluation", examples=errors, out=out / "evaluation.html")
    return figures


def _wrong(judged: pd.DataFrame, trained: Sequence[str]) -> pd.DataFrame:
    """The wrong answers, surest first, with their probability; of labels that the model could have given."""
    words = vocabulary.load()
    of_label = {t: set(words.children(t)) & set(trained) for t in judged["true_type"].dropna().unique()}
    allowed = [of_label.get(t, set()) for t in judged["true_type"]]
    wrong = judged[[bool(a) and p not in a for a, p in zip(allowed, judged["predicted_type"], strict=True)]]
    wrong = wrong.assign(probability=wrong[[f"p_{t}" for t in words.types]].max(axis=1))
    return wrong.sort_values(["probability", "sha256"], ascending=[False, True])


def _examples(model: RecognitionModel, directory: Path, wrong: pd.DataFrame, count: int) -> list[dict[str, Any]]:
    """The surest wrong answers of each site and label in turn: the picture as the network saw it, and what the name rests on."""
    turn = wrong.groupby(["site", "true_type"]).cumcount().sort_values(kind="stable")
    chosen = wrong.loc[turn.index[:count]].sort_values(["site", "true_type"], kind="stable")
    found = lookup.Known(dataset.cells_folder(directory).parent).find(
        list(chosen["sha256"]), ["site", "microns_per_px", "image"]
    )
    crops = {sha: model.prepare(data, scale_of(*about)[0]) for sha, (*about, data) in found.items()}

    def picture(sha: str, named: str) -> str:
        crop, column = crops[sha], model.card.types.index(named)
        asked = model.run(occlusion.covered(crop), "type_probabilities")[0]
        jpeg = images.jpeg_preview(np.hstack([crop, occlusion.overlay(crop, occlusion.drop(asked, column))]))
        return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")

    told = chosen[["site", "true_type", "predicted_type", "probability"]].to_dict("records")
    return [
        {**row, "sha256_prefix": sha[:12], "data_uri": picture(sha, row["predicted_type"])}
        for sha, row in zip(chosen["sha256"], told, strict=True)
    ]
