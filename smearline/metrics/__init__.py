"""What a recogniser is worth, as one JSON-able dictionary: per class, per site and by patient, in figures that do not
flatter (decision 10)."""

import zlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
import yaml

from smearline.dataset import patients
from smearline.errors import DataError
from smearline.metrics.blasts import score_blasts, score_pseudo_smears, score_smears
from smearline.metrics.cells import codes, interval_by, num_patients, read_cells, trained_types
from smearline.metrics.characteristics import score_characteristics
from smearline.metrics.intervals import RESAMPLES
from smearline.metrics.sureness import score_sureness
from smearline.metrics.type_scores import MIN_SUPPORT, score_calibration, score_types
from smearline.plain_json import plain
from smearline.vocabulary import load

Json = dict[str, Any]


def evaluate(
    predictions: pd.DataFrame,
    truth: pd.DataFrame,
    *,
    train_labels: pd.DataFrame,
    seed: int = 0,
    origin: str,
    context: Mapping[str, Any],
    flag_above: float | None = None,
    blast_from: float | None = None,
) -> Json:
    """Score predictions against labels: one deterministic dictionary, floats rounded to 6 places, null for unknown.

    Args:
        predictions: a row a cell: sha256, site, patient, smear, true_type (type, parent or null), predicted_type,
            p_<TYPE> of each trained type (0..1, summing to 1), c_<NAME> of each trained characteristic, scale_assumed.
        truth: sha256, name, value: labels of characteristics.
        train_labels: sha256, true_type and a column for each characteristic, of the training cells.
        seed: of the bootstrap; the same input and seed give the same dictionary.
        origin: 'real' or 'simulated'.
        flag_above: share of blasts beyond which the model flags a smear (its card's `blasts_above`).
        blast_from: the probability from which the model counts a cell as a possible blast (its card's `blast_from`).
        context: what the figures belong to (data version, model, split); copied into the result.

    Raises:
        DataError: see `read_cells` and `score_characteristics`; or an unknown origin.
    """
    if origin not in ("real", "simulated"):
        raise DataError(f"origin '{origin}' is not known; give 'real' or 'simulated' (anything simulated is simulated)")
    every = read_cells(predictions)
    cells = every[every["label"] >= 0]
    counts = {site: _counts(part) for site, part in every.groupby("site")}
    overall = _scope("", cells, seed, blast_from)
    by_site = {str(site): _scope(str(site), part, seed, blast_from) for site, part in cells.groupby("site")}
    characteristics = score_characteristics(cells, truth, train_labels, seed)
    unknown = sorted(cells.loc[patients(cells).isna(), "site"].unique())
    per_class = overall["types"]["per_class"]
    texts = yaml.safe_load(files(__package__).joinpath("texts.yaml").read_text(encoding="utf-8"))
    metrics: Json = {
        "origin": origin,
        "context": dict(context),
        "vocabulary": load().version,
        "counts": _counts(every) | {"by_site": counts},
        "patient_independent": not unknown,
        "patient_note": texts["no_patients"].format(", ".join(unknown)) if unknown else None,
        "intervals": {"level": 0.95, "resamples": RESAMPLES, "seed": seed, "by": interval_by(cells)},
        **{
            part: {"overall": scores, "by_site": {site: scored[part] for site, scored in by_site.items()}}
            for part, scores in overall.items()
        },
        "characteristics": characteristics,
        "not_tested": {
            "types": [t for t in codes().types if t not in per_class],
            "types_not_trained": [t for t in codes().types if t not in trained_types(every)],
            "listed_only": [c for c, row in per_class.items() if row["listed_only"]],
            "least_cells": MIN_SUPPORT,
            "characteristics": [n for n, c in characteristics.items() if c["status"] == "not tested"],
            "characteristics_not_trained": [n for n, c in characteristics.items() if not c["trained"]],
            "sites_without_patients": unknown,
        },
        "paper": texts["paper"]
        | {
            "types": {
                t: {name: per_class[t][name] for name in ("support", "one_vs_rest_accuracy")}
                for t in load().differential_types
                if t in per_class
            }
        },
    }
    metrics["blast"]["smears"] = score_smears(cells, np.random.default_rng([seed, 1]), flag_above)
    if flag_above is not None:
        metrics["blast"]["pseudo_smears"] = score_pseudo_smears(cells, flag_above)
    result: Json = plain(metrics)
    return result


def headline(metrics: Json) -> dict[str, float]:
    """The few numbers for `dvc metrics`, overall and as '<site>.<name>', with lower bounds; unknown ones are absent."""
    found: dict[str, float | None] = {}
    for site in (None, *metrics["types"]["by_site"]):
        types, blast, calibration = (
            metrics[part]["by_site"][site] if site else metrics[part]["overall"]
            for part in ("types", "blast", "calibration")
        )
        estimates = {n: types[n] for n in ("accuracy", "balanced_accuracy", "macro_f1")}
        estimates |= {"blast_auc": blast["auc"], "blast_sensitivity": blast["sensitivity"]}
        prefix = f"{site}." if site else ""
        for name, estimate in estimates.items():
            found |= {f"{prefix}{name}": estimate["value"], f"{prefix}{name}_low": estimate["low"]}
        found[f"{prefix}ece"] = calibration["ece"]
    tested = [c for c in metrics["characteristics"].values() if c["status"] == "tested"]
    f1 = [c["macro_f1"]["value"] for c in tested if c["macro_f1"]["value"] is not None]
    found["characteristics_macro_f1"] = sum(f1) / len(f1) if f1 else None
    found["characteristics_tested"] = len(tested)
    found["characteristics_beating_type_only"] = sum(c["beats_type_only"] for c in tested)
    return {name: round(float(value), 6) for name, value in found.items() if value is not None}


def _scope(name: str, cells: pd.DataFrame, seed: int, blast_from: float | None) -> Json:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])  # a further site changes no other site's intervals
    return score_types(cells, rng) | {
        "calibration": score_calibration(cells),
        "sureness": score_sureness(cells, rng),
        "blast": score_blasts(cells, rng, blast_from),
    }


def _counts(every: pd.DataFrame) -> Json:
    """How many cells; and of the labelled ones, which alone are judged, how many patients, smears and so on."""
    cells = every[every["label"] >= 0]
    return {
        "cells": len(every),
        "labelled": len(cells),
        "parent_labelled": int(cells["true_type"].isin(list(load().parents)).sum()),
        "unlabelled": len(every) - len(cells),
        "patients": num_patients(cells),
        "without_patient": int(cells["patient"].isna().sum()),
        "smears": len(cells.loc[cells["smear"].notna(), ["site", "smear"]].drop_duplicates()),
        "scale_assumed": int(cells["scale_assumed"].astype(bool).sum()),
    }
