"""Every patient of JHU and every cell of PBC, whose patients are not known, tested once: the recipe five times, each with another
fifth for the test.

    python -m bench.folds --data FOLDER [--recipe real-full] [--epochs N]

In the workspace .work/folds: its parameters differ by `split.fold` alone, and each fold is the pipeline's own stages up to the
evaluation. Killed, it goes on; DVC takes a fold that is done from its cache. The answers of the five are then judged as one: no
cell of a known patient by a network that saw him, and no cell of PBC by one that saw it or a near duplicate. Probabilities are
of five networks with a calibration each, so the blasts' AUC is given fold by fold, and a cell is a possible blast by its own
fold's limit. Result: bench/results/folds.json.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from bench import results
from flows import lines
from smearline import dataset, metrics, plain_json
from smearline.errors import SmearlineError
from smearline.metrics.blasts import BLAST
from smearline.metrics.cells import codes, read_cells
from smearline.metrics.intervals import share

FOLDS, SITES = 5, ("pbc", "jhu")


def of_smears(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures["blast"]["smears"].items() if name != "rows"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real sets (docs/data.md)")
    parser.add_argument("--recipe", default="real-full")
    parser.add_argument("--epochs", type=int, help="of each training, in place of the recipe's")
    given = parser.parse_args()
    space = lines.prepare("folds", given.recipe)
    lines.imported(space, lines.sets_in(given.data.resolve(), SITES))
    params = space.folder / "params.yaml"
    settings = yaml.safe_load(params.read_text(encoding="utf-8"))
    settings["train"]["epochs"] = given.epochs or settings["train"]["epochs"]
    settings["split"] |= {"test": 1 / FOLDS, "train_sites": [], "test_only_sites": []}
    answers, by_fold = [], list[dict[str, Any]]()
    for fold in range(FOLDS):
        settings["split"]["fold"] = fold
        params.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        space.commit(f"Fold {fold}", "params.yaml")
        space.call("dvc", "repro", "evaluate_cells")
        space.commit(f"Fold {fold} has run", "dvc.lock", "evaluation/headline.json", "splits.json")
        found = pd.read_parquet(space.folder / "evaluation" / "predictions.parquet")
        figures = plain_json.read(space.folder / "evaluation" / "metrics.json")
        told = {
            site: {n: figures["types"]["by_site"][site][n] for n in ("accuracy", "balanced_accuracy")} for site in SITES
        }
        blast = figures["blast"]["by_site"]["jhu"]
        # Without `screen` no limit reached the PPV on the validation cells, and no cell is a possible blast.
        found["possible_blast"] = found["p_BLAST"] >= blast.get("screen", {"from": 2.0})["from"]
        by_fold.append({"fold": fold, "blast": blast, "smears": of_smears(figures)} | told)
        answers.append(found[~found["seen_in_training"]])
    every = pd.concat(answers, ignore_index=True)
    whole = dataset.index(space.folder / "data", ["sha256"])
    assert sorted(every["sha256"]) == sorted(whole["sha256"]), "each cell is tested in one fold, and in no other"
    for column in [c for c in every if c.startswith("p_")]:
        every[column] = every[column].fillna(0.0)  # a type that one fold's training patients do not have
    truth = pd.DataFrame(columns=["sha256", "name", "value"])
    pooled = metrics.evaluate(every, truth, train_labels=truth, origin="real", context={})
    jhu = read_cells(every[(every["site"] == "jhu") & every["true_type"].notna()])
    blast_N = (jhu["label"] == codes().codes.index(BLAST)).to_numpy()
    over_N = jhu["possible_blast"].to_numpy(bool)
    cluster_N, rng = jhu["cluster"].to_numpy(), np.random.default_rng(7)
    content = {
        "recipe": given.recipe,
        "epochs": settings["train"]["epochs"],
        "cells": len(every),
        "patient_independent": pooled["patient_independent"],
        "patient_note": pooled["patient_note"],
        "pooled": {
            site: {
                "types": {
                    n: pooled["types"]["by_site"][site][n] for n in ("accuracy", "balanced_accuracy", "macro_f1")
                },
                "patients": pooled["counts"]["by_site"][site]["patients"],
                "blast": {n: pooled["blast"]["by_site"][site][n] for n in ("sensitivity", "ppv")},
            }
            for site in SITES
        },
        "possible_blasts": {
            "sensitivity": share(over_N[blast_N], cluster_N[blast_N], rng),
            "ppv": share(blast_N[over_N], cluster_N[over_N], rng),
        },
        "smears": of_smears(pooled),
        "by_fold": by_fold,
    }
    results.write("folds", content, space.folder / "data")


if __name__ == "__main__":
    try:
        main()
    except SmearlineError as error:
        raise SystemExit(f"folds: {error}") from None
