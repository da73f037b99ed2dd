"""Every patient tested once: the recipe five times, each with another fifth of the patients for the test.

    python -m bench.folds --data FOLDER [--recipe real-full]

In the workspace .work/folds: its parameters differ by `split.fold` alone, and each fold is the pipeline's own stages up to the
evaluation. Killed, it goes on; DVC takes a fold that is done from its cache. The answers of the five are then judged as one:
no cell by a network that saw its patient. Result: bench/results/folds.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from bench import results
from flows import lines
from smearline import metrics, plain_json

FOLDS, SITES = 5, ("pbc", "jhu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder of the real sets (docs/data.md)")
    parser.add_argument("--recipe", default="real-full")
    given = parser.parse_args()
    space = lines.prepare("folds", given.recipe)
    lines.imported(space, lines.sets_in(given.data.resolve(), SITES))
    params = space.folder / "params.yaml"
    settings = yaml.safe_load(params.read_text(encoding="utf-8"))
    settings["split"]["test_only_sites"] = []
    answers, by_fold = [], list[dict[str, Any]]()
    for fold in range(FOLDS):
        settings["split"]["fold"] = fold
        params.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
        space.commit(f"Fold {fold}", "params.yaml")
        space.call("dvc", "repro", "evaluate_cells")
        space.commit(f"Fold {fold} has run", "dvc.lock", "evaluation/headline.json", "splits.json")
        found = pd.read_parquet(space.folder / "evaluation" / "predictions.parquet")
        figures = plain_json.read(space.folder / "evaluation" / "metrics.json")["types"]["by_site"]
        by_fold.append(
            {"fold": fold} | {site: {n: figures[site][n] for n in ("accuracy", "balanced_accuracy")} for site in SITES}
        )
        answers.append(found[~found["seen_in_training"]])
    every = pd.concat(answers, ignore_index=True)
    assert every["sha256"].is_unique, "each cell is tested in one fold"
    for column in [c for c in every if c.startswith("p_")]:
        every[column] = every[column].fillna(0.0)  # a type that one fold's training patients do not have
    truth = pd.DataFrame(columns=["sha256", "name", "value"])
    pooled = metrics.evaluate(every, truth, origin="real", context={})
    told = {
        "recipe": given.recipe,
        "cells": len(every),
        "pooled": {
            site: {
                "types": {
                    n: pooled["types"]["by_site"][site][n] for n in ("accuracy", "balanced_accuracy", "macro_f1")
                },
                "patients": pooled["counts"]["by_site"][site]["patients"],
                "blast": {n: pooled["blast"]["by_site"][site][n] for n in ("auc", "sensitivity", "ppv")},
            }
            for site in SITES
        },
        "by_fold": by_fold,
    }
    results.write("folds", told, space.folder / "data")


if __name__ == "__main__":
    main()
